"""Train one run once more on a target that is known to have one head per feature: the null for superposition."""

from crosshead.activations.batches import Batches
from crosshead.activations.machine import Machine
from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.analysis.one_head import SEED_OFFSET, PlantedSource, null_row
from crosshead.dictionaries.base import DictionaryConfig
from crosshead.dictionaries.registry import build, load_dictionary
from crosshead.io.files import read_json, write_json
from crosshead.training.fit import fit
from crosshead.training.runs import Run, read_run
from flows._inputs import open_cache
from flows._runtime import Stage, main


def nulls(stage: Stage) -> None:
    """Train and evaluate one run on the planted target; a killed training goes on at its last checkpoint."""
    run = _read_run(stage)
    evaluation = stage.section("evaluation", EvaluationConfig)
    device = stage.section("machine", Machine).prepare()
    config = run.dictionary_config(read_json(stage.data / "survey" / "layers.json"))
    home = stage.data / "null_target"
    teacher = load_dictionary(stage.data / "runs" / read_json(home / "target.json")["teacher"])
    planted = PlantedSource(open_cache(stage, device), teacher, home)
    _check_target(stage, run, config, planted)
    module = build(config, planted.dims)

    def batches(split: str, sites: tuple, size: int) -> Batches:
        return Batches(planted, split, sites, size, run.seed, device=device)

    size = run.schedule.contexts_per_batch
    identity = _identity(stage, run)
    with stage.work(identity) as work:
        fit(
            module, batches("train", (*module.sites, *module.start_sites), size),
            batches("heldout", module.sites, size), planted.weights(), run.schedule, seed=run.seed, work=work,
            identity=identity, device=device, description=f"null {run.name}",
        )  # fmt: skip
        size = evaluation.contexts_per_batch
        refit = batches("train", module.sites, size).sample(evaluation.refit_contexts, run.seed + 2)
        measured = evaluate(module, batches("heldout", module.sites, size).all(), evaluation, refit)
        write_json(stage.data / "nulls" / f"{run.name}.json", null_row(run, module, measured))


def _read_run(stage: Stage) -> Run:
    """The run as it stands under ``runs:``, with another seed than the teacher can have had."""
    if stage.run is None:
        raise ValueError(f"name a run of {stage.source}: --run <an entry of nulls.runs>")
    entry = stage.sections["runs"][stage.run]
    kind = entry.get("kind") if isinstance(entry, dict) else None
    defaults = (stage.sections.get("dictionaries") or {}).get(kind) or {}
    run = read_run(stage.run, entry, defaults, stage.sections.get("training") or {}, stage.source)
    return run.model_copy(update={"seed": run.seed + SEED_OFFSET})


def _check_target(stage: Stage, run: Run, config: DictionaryConfig, planted: PlantedSource) -> None:
    target = getattr(config, "target", None)
    if config.layers != (planted.planted.layer,) or target != planted.planted.name or run.control != "none":
        raise ValueError(f"{stage.source}: nulls.runs names {run.name!r}, which predicts {target} of layers "
                         f"{list(config.layers)} (control {run.control}); the teacher predicts {planted.planted}: name "
                         "runs that predict the same")  # fmt: skip


def _identity(stage: Stage, run: Run) -> str:
    keys = (f"runs.{run.name}", f"dictionaries.{run.kind}", "training", "evaluation", "machine")
    inputs = (stage.data / "cache" / "manifest.json", stage.data / "survey" / "layers.json",
              stage.data / "null_target" / "target.json")  # fmt: skip
    return stage.identity(keys, inputs)


if __name__ == "__main__":
    main(nulls)
