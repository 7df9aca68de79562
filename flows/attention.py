"""Train one attention model and evaluate it: one run of ``attention_runs``."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from crosshead.activations.base_model import load_model
from crosshead.activations.batches import Batches
from crosshead.activations.machine import Machine
from crosshead.analysis.attention_metrics import evaluate
from crosshead.analysis.attention_records import attention_record
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.attention.registry import build
from crosshead.dictionaries.base import Trainable
from crosshead.io.files import atomic_directory, read_json, write_json
from crosshead.training.fit import Speed, fit
from crosshead.training.runs import Run
from flows._attention_runs import main, read_attention_run, take_attention_
from flows._inputs import open_cache
from flows._runtime import Stage
from flows._tracking import TrackedRun, experiment_name, final_metrics, run_parameters, run_tags


def attention(stage: Stage) -> None:
    """Train and evaluate one attention model; a killed training goes on at its last checkpoint."""
    assert stage.run is not None
    run = read_attention_run(stage, stage.run)
    evaluation = stage.section("attention_evaluation", EvaluationConfig)
    device = stage.section("machine", Machine).prepare()
    config = run.dictionary_config(read_json(stage.data / "survey" / "layers.json"))
    cache = open_cache(stage, device)
    module = build(config, cache.dims)
    take_attention_(module, cache)
    identity = _identity(stage, run)
    with stage.work(identity) as work, _tracked(stage, run, config, identity) as tracked:

        def batches(split: str, sites: tuple, size: int) -> Batches:
            return Batches(cache, split, sites, size, run.seed, run.control, device)

        size = run.schedule.contexts_per_batch
        result = fit(
            module, batches("train", (*module.sites, *module.start_sites), size),
            batches("heldout", module.sites, size), cache.weights(), run.schedule, seed=run.seed, work=work,
            identity=identity, device=device, on_metrics=tracked.log, on_speed=partial(_tell_speed, tracked),
            description=run.name,
        )  # fmt: skip
        size = evaluation.contexts_per_batch
        fitted_on = batches("train", module.sites, size).sample(evaluation.refit_contexts, run.seed + 2)
        model = load_model(stage.data / "model", device=device)
        heldout = batches("heldout", module.sites, size).all()
        measured = evaluate(module, heldout, evaluation, train=fitted_on, model=model)
        record = attention_record(run, module, measured, tokens_trained=result.tokens)
        _save(stage, run, module, result.history, record)
        tracked.finish(result.history, final_metrics(record), stage.data / "attention" / run.name)


def _tell_speed(tracked: TrackedRun, speed: Speed) -> None:
    """Speed and peak memory go to the console and to MLflow: two equal runs do not share them."""
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tracked.note(tokens_per_second=speed.tokens_per_second, waited_share=speed.waited_share, peak_mib=peak_mib)
    print(f"{speed.tokens_per_second:,.0f} positions per second; peak memory so far {peak_mib:,.0f} MiB")


def _identity(stage: Stage, run: Run) -> str:
    keys = (f"attention_runs.{run.name}", f"attention_models.{run.kind}", "training", "attention_evaluation",
            "machine")  # fmt: skip
    inputs = (stage.data / "cache" / "manifest.json", stage.data / "survey" / "layers.json")
    return stage.identity(keys, inputs)


def _save(stage: Stage, run: Run, module: Trainable, history: list[dict[str, float]], record: dict[str, Any]) -> None:
    with atomic_directory(stage.data / "attention" / run.name) as directory:
        module.save(directory / "model")
        for file in (directory / "model").iterdir():
            file.rename(directory / file.name)
        (directory / "model").rmdir()
        write_json(directory / "history.json", history)
    write_json(stage.reports / "attention" / f"{run.name}.json", record)
    write_json(stage.reports / "summaries" / f"{run.name}.json", final_metrics(record))


@contextmanager
def _tracked(stage: Stage, run: Run, config: Any, identity: str) -> Iterator[TrackedRun]:
    parameters = run_parameters(config, run.schedule, run.seed, run.control)
    tags = run_tags(stage.name, stage.profile, run.series, run.seed, config.kind, config.layers)
    tracked = TrackedRun(
        experiment_name(stage.profile, run.family), run.name, identity, parameters=parameters, tags=tags
    )
    try:
        yield tracked
    except BaseException as error:
        tracked.fail("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise


if __name__ == "__main__":
    main(attention)
