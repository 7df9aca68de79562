"""Refill MLflow from the reports: a pulled or skipped stage executes nothing, so nothing was logged. Idempotent."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crosshead.dictionaries.base import DictionaryConfig
from crosshead.io.files import read_json
from crosshead.params import Params, load_params
from crosshead.training.runs import Run
from flows._tracking import (
    TrackedRun,
    experiment_name,
    final_metrics,
    find_runs,
    open_client,
    record_tag,
    revision_of_record,
    run_parameters,
    run_tags,
)
from flows._views import add_views

__all__ = ["publish"]


def publish(params: Params) -> list[str]:
    """Log every run that has a report and is not in MLflow with the same figures. Returns the names of those logged.

    A report of other parameters than the file now has is left out with a message: nothing says what it was made with.
    """
    client = open_client()
    logged = []
    for stage_name, directory, run in _trainings(params):
        report = Path(params.paths.reports, directory, f"{run.name}.json")
        if not report.exists():
            continue
        record = read_json(report)
        experiment, stage = experiment_name(params.profile, run.family), f"{stage_name}@{run.name}"
        mark = record_tag(final_metrics(record))
        found = find_runs(client, experiment, record=mark, dvc__stage=stage)
        if any(other.info.status == "FINISHED" for other in found):  # else: publishing it was interrupted
            continue
        config = _config(run, record)
        differing = _differences(run, config, record)
        if differing:
            print(f"publish: {report} was made with other parameters than {run.registry.runs}.{run.name} has now ("
                  f"{'; '.join(differing)}); left out, run the stage {stage} first", file=sys.stderr)  # fmt: skip
            continue
        home = Path(params.paths.data, directory, run.name)
        history = read_json(home / "history.json") if (home / "history.json").exists() else []
        tags = run_tags(stage, params.profile, run.series, run.seed, config.kind, config.layers,
                        revision_of_record(report))  # fmt: skip
        parameters = run_parameters(config, run.schedule, run.seed, run.control)
        tracked = TrackedRun(experiment, run.name, f"published-{mark}-{run.name}", parameters=parameters, tags=tags)
        tracked.finish(history, final_metrics(record), home)
        logged.append(run.name)
    add_views(client)
    return logged


def _trainings(params: Params) -> list[tuple[str, str, Run]]:
    """Every run, with the stage that trains it and the directory of its outputs."""
    return [*(("train", "runs", run) for run in params.runs.values()),
            *(("attention", "attention", run) for run in params.attention_runs.values())]  # fmt: skip


def _config(run: Run, record: Mapping[str, Any]) -> DictionaryConfig:
    """The architecture's config on the layers that the record names: the survey that chose them may not be here."""
    return run.registry.config_class(run.kind).model_validate({**run.dictionary, "layers": record["layers"]})


def _differences(run: Run, config: DictionaryConfig, record: Mapping[str, Any]) -> list[str]:
    """What a record says of its parameters and the run does not, e.g. ``steps 40, now 400``."""
    dictionary = config.model_dump(mode="json")
    now = {
        "architecture": config.kind,
        **{name: dictionary.get(name) for name in ("features", "heads_per_feature", "sparsity")},
        "seed": run.seed,
        "control": run.control,
        "steps": run.schedule.steps,
    }
    return [f"{name} {record.get(name)}, now {value}" for name, value in now.items() if record.get(name) != value]


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.publish", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the profile's parameter file")
    try:
        params = load_params(parser.parse_args().params)
        logged = publish(params)
    except (ValueError, OSError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    if not any(
        Path(params.paths.reports, directory, f"{run.name}.json").exists() for _, directory, run in _trainings(params)
    ):
        print(f"publish: {params.paths.reports}/runs holds no report of the {params.profile} profile; run "
              f"make findings PROFILE={params.profile} first", file=sys.stderr)  # fmt: skip
        return 2
    print(f"logged {len(logged)} runs" + (f": {', '.join(logged)}" if logged else "; MLflow has them all"))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
