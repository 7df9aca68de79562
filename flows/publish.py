"""Refill MLflow from the reports: a pulled or skipped stage executes nothing, so nothing was logged. Idempotent."""

import argparse
import sys
from pathlib import Path

from crosshead.io.files import read_json
from crosshead.params import Params, load_params
from flows._tracking import TrackedRun, experiment_name, final_metrics, find_runs, open_client, record_tag, run_tags
from flows._views import add_views

__all__ = ["publish"]

_PARAMETERS = ("features", "heads_per_feature", "target", "sparsity", "control", "steps", "tokens_trained",
               "parameters")  # fmt: skip


def publish(params: Params) -> list[str]:
    """Log every run that has a report and is not in MLflow with the same figures. Returns the names of those logged."""
    client = open_client()
    logged = []
    for run in params.runs.values():
        report = Path(params.paths.reports, "runs", f"{run.name}.json")
        if not report.exists():
            continue
        record = read_json(report)
        experiment, stage = experiment_name(params.profile, run.family), f"train@{run.name}"
        mark = record_tag(final_metrics(record))
        if find_runs(client, experiment, record=mark, dvc__stage=stage):
            continue
        home = Path(params.paths.data, "runs", run.name)
        history = read_json(home / "history.json") if (home / "history.json").exists() else []
        tags = run_tags(stage, params.profile, run.series, run.seed, record["architecture"], record["layers"])
        tracked = TrackedRun(experiment, run.name, f"published-{mark}-{run.name}",
                             parameters={key: record[key] for key in _PARAMETERS}, tags=tags)  # fmt: skip
        tracked.finish(history, final_metrics(record), home)
        logged.append(run.name)
    add_views(client)
    return logged


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.publish", description=__doc__)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the profile's parameter file")
    try:
        logged = publish(load_params(parser.parse_args().params))
    except (ValueError, OSError) as error:
        print(f"publish: {error}", file=sys.stderr)
        return 2
    print(f"logged {len(logged)} runs" + (f": {', '.join(logged)}" if logged else "; MLflow has them all"))
    return 0


if __name__ == "__main__":
    raise SystemExit(_main())
