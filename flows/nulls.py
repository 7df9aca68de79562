"""Train some runs once more on a target that is known to have one head per feature: the null for superposition."""

from pathlib import Path
from typing import Any

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationSource
from crosshead.activations.machine import Machine
from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.analysis.one_head import NullConfig, PlantedSource, null_record, null_row
from crosshead.dictionaries.base import Dictionary, DictionaryConfig
from crosshead.dictionaries.registry import build, load_dictionary
from crosshead.io.files import atomic_directory, read_json, write_json
from crosshead.training.fit import fit
from crosshead.training.runs import Run, read_run
from flows._inputs import open_cache
from flows._runtime import Stage, main


def nulls(stage: Stage) -> None:
    """Train and evaluate every run that ``nulls.runs`` names on the planted target; a killed one goes on."""
    config = stage.section("nulls", NullConfig)
    evaluation = stage.section("evaluation", EvaluationConfig)
    device = stage.section("machine", Machine).prepare()
    runs = [run.model_copy(update={"seed": run.seed + config.seed_offset})
            for run in (_read_run(stage, name) for name in config.runs)]  # fmt: skip
    layers = read_json(stage.data / "survey" / "layers.json")
    dictionaries = [run.dictionary_config(layers) for run in runs]
    home = stage.data / "runs" / config.teacher
    if config.teacher not in stage.sections["runs"]:
        raise ValueError(f"{stage.source}: nulls.teacher names {config.teacher!r}, which is not under runs; correct it")
    teacher = load_dictionary(home).to(device)
    teacher.engine = runs[0].schedule.engine
    cache = open_cache(stage, device)
    with stage.work(_identity(stage, config, home)) as work:
        planted = PlantedSource(cache, teacher, work)
        for run, own in zip(runs, dictionaries, strict=True):
            _check_target(stage, run, own, planted)
        rows = [_trained(run, own, planted, evaluation, device, work / run.name)
                for run, own in zip(runs, dictionaries, strict=True)]  # fmt: skip
        real, noise = (_heldout_error(teacher, source, evaluation, device) for source in (cache, planted))
        with atomic_directory(stage.data / "nulls") as directory:
            write_json(directory / "nulls.json", null_record(config.teacher, real, noise, rows))


def _read_run(stage: Stage, name: str) -> Run:
    entries, defaults = stage.sections["runs"], stage.sections.get("dictionaries") or {}
    if name not in entries:
        raise ValueError(f"{stage.source}: nulls.runs names {name!r}, which is not under runs; correct it")
    kind = entries[name].get("kind") if isinstance(entries[name], dict) else None
    return read_run(name, entries[name], defaults.get(kind) or {}, stage.sections.get("training") or {}, stage.source)


def _check_target(stage: Stage, run: Run, config: DictionaryConfig, planted: PlantedSource) -> None:
    target = getattr(config, "target", None)
    if config.layers != (planted.planted.layer,) or target != planted.planted.name or run.control != "none":
        raise ValueError(f"{stage.source}: nulls.runs names {run.name!r}, which predicts {target} of layers "
                         f"{list(config.layers)} (control {run.control}); the teacher predicts {planted.planted}: name "
                         "runs that predict the same")  # fmt: skip


def _identity(stage: Stage, config: NullConfig, teacher: Path) -> str:
    keys = ("nulls", "training", "evaluation", "machine", "dictionaries", *(f"runs.{run}" for run in config.runs))
    inputs = (stage.data / "cache" / "manifest.json", stage.data / "survey" / "layers.json",
              teacher / "dictionary.json", teacher / "weights.safetensors")  # fmt: skip
    return stage.identity(keys, inputs)


def _trained(
    run: Run, config: DictionaryConfig, planted: PlantedSource, evaluation: EvaluationConfig, device: str, work: Path
) -> dict[str, Any]:
    """The row of a run: from an earlier attempt, or trained as ``flows.train`` does, on the planted target."""
    if (done := work / "row.json").exists():
        return read_json(done)
    module = build(config, planted.dims)

    def batches(split: str, sites: tuple, size: int) -> Batches:
        return Batches(planted, split, sites, size, run.seed, device=device)

    size = run.schedule.contexts_per_batch
    fit(
        module, batches("train", (*module.sites, *module.start_sites), size), batches("heldout", module.sites, size),
        planted.weights(), run.schedule, seed=run.seed, work=work, identity=run.name, device=device,
        description=f"null {run.name}",
    )  # fmt: skip
    size = evaluation.contexts_per_batch
    refit = batches("train", module.sites, size).sample(evaluation.refit_contexts, run.seed + 2)
    measured = evaluate(module, batches("heldout", module.sites, size).all(), evaluation, refit)
    write_json(done, null_row(run, module, measured))
    return read_json(done)


def _heldout_error(teacher: Dictionary, source: ActivationSource, evaluation: EvaluationConfig, device: str) -> float:
    batches = Batches(source, "heldout", teacher.sites, evaluation.contexts_per_batch, 0, device=device)
    return evaluate(teacher, batches.all(), evaluation).normalised_mse


if __name__ == "__main__":
    main(nulls)
