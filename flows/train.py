"""Train one dictionary and evaluate it: one run of the parameter file."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from crosshead.activations.base_model import load_model
from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationSource
from crosshead.activations.machine import Machine
from crosshead.analysis.evaluation import EvaluationConfig, evaluate
from crosshead.analysis.records import run_record
from crosshead.analysis.splicing import Splicing, cross_entropy_recovered
from crosshead.dictionaries.base import Dictionary
from crosshead.dictionaries.registry import build
from crosshead.io.files import atomic_directory, read_json, write_json
from crosshead.training.fit import Speed, fit
from crosshead.training.runs import Run, read_run
from flows._inputs import open_cache
from flows._runtime import Stage, main, repository_root
from flows._tracking import TrackedRun, experiment_name, final_metrics, run_parameters, run_tags


def train(stage: Stage) -> None:
    """Train and evaluate one dictionary; a killed training goes on at its last checkpoint."""
    run = _read_run(stage)
    evaluation = stage.section("evaluation", EvaluationConfig)
    device = stage.section("machine", Machine).prepare()
    layers = read_json(stage.data / "survey" / "layers.json")
    config = run.dictionary_config(layers)
    cache = open_cache(stage, device)
    module = build(config, cache.dims)
    identity = _identity(stage, run)
    with stage.work(identity) as work, _tracked(stage, run, config, identity) as tracked:
        sites = (*module.sites, *module.start_sites)
        result = fit(
            module,
            Batches(cache, "train", sites, run.schedule.contexts_per_batch, run.seed, run.control, device),
            Batches(cache, "heldout", module.sites, run.schedule.contexts_per_batch, run.seed, run.control, device),
            cache.weights(), run.schedule, seed=run.seed, work=work, identity=identity, device=device,
            on_metrics=tracked.log, on_speed=partial(_tell_speed, tracked), description=run.name,
        )  # fmt: skip
        size = evaluation.contexts_per_batch
        heldout = Batches(cache, "heldout", module.sites, size, run.seed, run.control, device)
        refit = Batches(cache, "train", module.sites, size, run.seed, run.control, device)
        measured = evaluate(module, heldout.all(), evaluation, refit.sample(evaluation.refit_contexts, run.seed + 2))
        spliced = _splice(stage, module, cache, evaluation, device)
        record = run_record(
            run, module, measured, spliced, tokens_trained=result.tokens, control_detail=heldout.control_detail
        )
        _save(stage, run, module, {"history": result.history, "feature_counts": measured.feature_counts}, record)
        tracked.finish(result.history, final_metrics(record), stage.data / "runs" / run.name)


def _tell_speed(tracked: TrackedRun, speed: Speed) -> None:
    tracked.note(tokens_per_second=speed.tokens_per_second, waited_share=speed.waited_share)
    rate, waited = f"{speed.tokens_per_second:,.0f}", f"{speed.waited_share:.1%}"
    print(f"{rate} positions per second; {waited} of the time spent waiting for batches")


def _read_run(stage: Stage) -> Run:
    assert stage.run is not None
    entry, defaults = stage.sections["runs"][stage.run], stage.sections.get("dictionaries") or {}
    kind = entry.get("kind") if isinstance(entry, dict) else None
    return read_run(stage.run, entry, defaults.get(kind) or {}, stage.sections.get("training") or {}, stage.source)


def _identity(stage: Stage, run: Run) -> str:
    keys = (f"runs.{run.name}", f"dictionaries.{run.kind}", "training", "evaluation", "machine")
    inputs = (stage.data / "cache" / "manifest.json", stage.data / "survey" / "layers.json")
    return stage.identity(keys, inputs)


def _splice(
    stage: Stage, module: Dictionary, cache: ActivationSource, config: EvaluationConfig, device: str
) -> Splicing:
    """Splice into the base model, always on the contexts as they are: a control has no say in what the model reads.

    A file in work/ remembers what ablations cost, for the other runs of the same code.
    """
    language_model = load_model(stage.data / "model", device=device)
    batches = Batches(cache, "heldout", module.sites, 1, 0, device=device).all()
    programs = replace(stage, name="train").identity(("machine",), ())
    memory = repository_root() / "work" / f"ablated-{programs}.json"
    ablated = read_json(memory) if memory.exists() else {}
    known = len(ablated)
    spliced = cross_entropy_recovered(module, language_model, islice(batches, config.splice_contexts), ablated)
    if len(ablated) > known:  # runs at the same time may both have written; what one loses is computed again
        write_json(memory, (read_json(memory) if memory.exists() else {}) | ablated)
    return spliced


def _save(stage: Stage, run: Run, module: Dictionary, beside: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    target = stage.data / "runs" / run.name
    with atomic_directory(target) as directory:
        module.save(directory / "dictionary")
        for file in (directory / "dictionary").iterdir():
            file.rename(directory / file.name)
        (directory / "dictionary").rmdir()
        for name, content in beside.items():
            write_json(directory / f"{name}.json", content)
    write_json(stage.reports / "runs" / f"{run.name}.json", record)
    write_json(stage.reports / "summaries" / f"{run.name}.json", final_metrics(record))


@contextmanager
def _tracked(stage: Stage, run: Run, config: Any, identity: str) -> Iterator[TrackedRun]:
    parameters = run_parameters(config, run.schedule, run.seed, run.control)
    tags = run_tags(stage.name, stage.profile, run.series, run.seed, config.kind, config.layers)
    experiment = experiment_name(stage.profile, run.family)
    tracked = TrackedRun(experiment, run.name, identity, parameters=parameters, tags=tags)
    try:
        yield tracked
    except BaseException as error:
        tracked.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


if __name__ == "__main__":
    main(train)
