"""The MLflow side of a training run. MLflow is a view: everything in it can be refilled from the reports.

The database lies at the repository root (or where MLFLOW_TRACKING_URI points). A run is found again by its fingerprint,
so a resumed training goes on in the same MLflow run, and no step is logged twice.
"""

import math
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from crosshead.io.files import fingerprint as fingerprint_of
from flows._runtime import lock, repository_root

# Before mlflow is imported: it phones home otherwise.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

__all__ = [
    "TrackedRun",
    "database_uri",
    "experiment_name",
    "final_metrics",
    "find_runs",
    "open_client",
    "record_tag",
    "revision_of_record",
    "run_parameters",
    "run_tags",
]

# What a result is made from. dvc.lock and the reports are written while the pipeline runs; they make nothing dirty.
_SOURCES = ("src", "flows", "dvc.yaml", "params.yaml", "pyproject.toml", "constraints.txt",
            ":(exclude,glob)flows/profiles/*/dvc.lock")  # fmt: skip
_BATCH = 1000
_FLUSH_SECONDS = 5.0
_STEP_MARK = "step"
_FINAL = ("l0", "normalised_mse", "ce_recovered", "ce_recovered_zero", "dead_fraction")


def database_uri() -> str:
    """The tracking database: MLFLOW_TRACKING_URI, or mlflow.db at the repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository_root() / 'mlflow.db'}"


def open_client() -> Any:
    """An MLflow client. Creating the database is done by one process at a time: two at once break it for good."""
    with lock(repository_root() / "work" / "mlflow.lock", "mlflow: another process creates the database"):
        client = MlflowClient(tracking_uri=database_uri())
        client.search_experiments(max_results=1)
    return client


def experiment_name(profile: str, family: str) -> str:
    """One experiment per family of findings; other profiles than the default keep to themselves."""
    return family if profile == "laptop" else f"{profile}-{family}"


def run_parameters(config: BaseModel, schedule: BaseModel, seed: int, control: str) -> dict[str, Any]:
    """The parameters of a run as MLflow shows them, nested: architecture, schedule, seed and control."""
    return {
        "dictionary": config.model_dump(mode="json"),
        "training": schedule.model_dump(mode="json"),
        "seed": seed,
        "control": control,
    }


def run_tags(
    stage: str, profile: str, series: str, seed: int, kind: str, layers: Sequence[int], revision: str | None = None
) -> dict[str, str]:
    """The tags by which runs are found; ``frontier`` is the series a run is a point of.

    ``revision`` is the commit a result belongs to, the one that is checked out by default.
    """
    return {
        "git.rev": _git_revision() if revision is None else revision,
        "dvc.stage": stage,
        "dvc.exp": os.environ.get("DVC_EXP_NAME", ""),
        "profile": profile,
        "frontier": series,
        "architecture": kind,
        "layers": "+".join(map(str, layers)),
        "seed": str(seed),
    }


def final_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """What a run is compared by."""
    return {name: record[name] for name in _FINAL if record[name] is not None}


def record_tag(metrics: Mapping[str, float]) -> str:
    """Identifies the final figures of a run."""
    return fingerprint_of(dict(metrics))


def _git_revision() -> str:
    """The commit that is checked out, with ``-dirty`` if code or parameters differ from it; ``unknown`` outside git."""
    commit = _git("rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if _git("status", "--porcelain", "--", *_SOURCES) else commit


def revision_of_record(record: Path) -> str:
    """The commit that holds a record as it is on disk; ``unknown`` when none does."""
    if _git("status", "--porcelain", "--ignored", "--", str(record)):
        return "unknown"
    return _git("log", "-1", "--format=%H", "--", str(record)) or "unknown"


def _git(*arguments: str) -> str:
    """What git prints; nothing when it fails or is not there."""
    try:
        # Without optional locks: `git status` would hold the index for a moment, and others may be committing.
        command = ["git", "--no-optional-locks", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def find_runs(client: Any, experiment: str, **tags: str) -> list[Any]:
    """Runs of an experiment that carry all these tags (dots in a tag's name are written as double underscores)."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    query = " and ".join(f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items())
    return list(client.search_runs([found.experiment_id], query, max_results=1000))


class TrackedRun:
    """One training as an MLflow run: created, or found by the fingerprint of an interrupted one."""

    def __init__(
        self, experiment: str, name: str, fingerprint: str, *, parameters: Mapping[str, Any], tags: Mapping[str, str]
    ):
        self._client = open_client()
        self._pending: list[Mapping[str, float]] = []
        self._flushed = time.monotonic()
        earlier = find_runs(self._client, experiment, fingerprint=fingerprint)
        if earlier:
            self.run_id: str = earlier[0].info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            marks = self._client.get_metric_history(self.run_id, _STEP_MARK)
            self._logged_to = max((metric.step for metric in marks), default=-1)
            return
        self._logged_to = -1
        created = self._client.create_run(
            _experiment_id(self._client, experiment), run_name=name, tags={**tags, "fingerprint": fingerprint}
        )
        self.run_id = created.info.run_id
        flat = [Param(key, str(value)) for key, value in flatten(parameters).items()]
        self._client.log_batch(self.run_id, params=flat)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note the metrics of a step; they are written every few seconds, and completed by ``finish``."""
        self._pending.append({**metrics, "step": step})
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._flush()

    def note(self, **tags: float) -> None:
        """Tag the run with what two equal runs do not share, such as its speed."""
        for name, value in tags.items():
            self._client.set_tag(self.run_id, name, f"{value:.4g}")

    def finish(self, history: Sequence[Mapping[str, float]], metrics: Mapping[str, float], artifacts: Path) -> None:
        """Log what is missing of the history, the final metrics, the trained dictionary; mark the run as finished.

        Training's own values are called ``train_<name>``, so that ``l0`` and ``normalised_mse`` are the final ones.
        """
        self._pending = list(history)
        self._flush()
        now, last = _now(), max((int(entry["step"]) for entry in history), default=0)
        rows = [Metric(key, float(value), now, last) for key, value in metrics.items() if math.isfinite(value)]
        self._client.log_batch(self.run_id, metrics=rows, tags=[RunTag("record", record_tag(metrics))])
        if artifacts.exists():
            self._client.log_artifacts(self.run_id, str(artifacts), "checkpoint")
        self._client.set_terminated(self.run_id, "FINISHED")

    def fail(self, status: str) -> None:
        """Mark the run as FAILED or KILLED; a later attempt with the same fingerprint goes on with it."""
        self._flush()
        self._client.set_terminated(self.run_id, status)

    def _flush(self) -> None:
        new = [entry for entry in self._pending if entry["step"] > self._logged_to]
        now = _now()
        rows = [
            Metric(_step_name(key), float(value), now, int(entry["step"]))
            for entry in new
            for key, value in entry.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(rows), _BATCH):
            self._client.log_batch(self.run_id, metrics=rows[start : start + _BATCH])
        self._logged_to = max((int(entry["step"]) for entry in new), default=self._logged_to)
        self._pending, self._flushed = [], time.monotonic()


def _step_name(metric: str) -> str:
    return metric if metric.startswith(("heldout_", _STEP_MARK)) else f"train_{metric}"


def _now() -> int:
    return int(time.time() * 1000)


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested parameters by dotted names."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            flat |= flatten(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def _experiment_id(client: Any, name: str) -> str:
    """The experiment, created by one process at a time."""
    with lock(repository_root() / "work" / "mlflow.lock", "mlflow: another process creates an experiment"):
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        artifacts = repository_root() / "mlartifacts" / name
        return client.create_experiment(name, artifact_location=artifacts.as_uri())
