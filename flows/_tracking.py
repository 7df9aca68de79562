"""The MLflow side of a training run. MLflow is a view: everything in it can be refilled from the reports.

The database lies at the repository root (or where MLFLOW_TRACKING_URI points). A run is found again by its fingerprint,
so a resumed training goes on in the same MLflow run, and no step is logged twice.
"""

import math
import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows._runtime import lock, repository_root

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

__all__ = ["TrackedRun", "database_uri", "find_runs", "git_revision", "open_client"]

_BATCH = 1000
STEP_MARK = "loss"


def database_uri() -> str:
    """The tracking database: MLFLOW_TRACKING_URI, or mlflow.db at the repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository_root() / 'mlflow.db'}"


def open_client() -> Any:
    """An MLflow client. Creating the database is done by one process at a time: two at once break it for good."""
    from mlflow import MlflowClient

    with lock(repository_root() / "work" / "mlflow.lock", "mlflow: another process creates the database"):
        client = MlflowClient(tracking_uri=database_uri())
        client.search_experiments(max_results=1)
    return client


def git_revision() -> str:
    """The commit that is checked out, with ``-dirty`` if files differ from it; ``unknown`` outside git."""
    result = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or "unknown"


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
        earlier = find_runs(self._client, experiment, fingerprint=fingerprint)
        if earlier:
            self.run_id: str = earlier[0].info.run_id
            self._client.update_run(self.run_id, status="RUNNING")
            marks = self._client.get_metric_history(self.run_id, STEP_MARK)
            self._logged_to = max((metric.step for metric in marks), default=-1)
            return
        self._logged_to = -1
        identity = _experiment_id(self._client, experiment)
        self.run_id = self._client.create_run(
            identity, run_name=name, tags={**tags, "fingerprint": fingerprint}
        ).info.run_id
        self._log_parameters(parameters)

    def _log_parameters(self, parameters: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = [Param(key, str(value)) for key, value in flatten(parameters).items()]
        self._client.log_batch(self.run_id, params=flat)

    def log(self, history: list[tuple[int, Mapping[str, float]]]) -> None:
        """Log metrics by step; steps that the run already has are passed over."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = [(step, metrics) for step, metrics in history if step > self._logged_to]
        rows = [
            Metric(key, float(value), now, step)
            for step, metrics in new
            for key, value in metrics.items()
            if math.isfinite(value)
        ]
        for start in range(0, len(rows), _BATCH):
            self._client.log_batch(self.run_id, metrics=rows[start : start + _BATCH])
        self._logged_to = max((step for step, _ in new), default=self._logged_to)

    def finish(self, metrics: Mapping[str, float], tags: Mapping[str, str], artifacts: Path | None) -> None:
        """Log final metrics, the directory of the trained dictionary, and mark the run as finished."""
        for key, value in metrics.items():
            if math.isfinite(value):
                self._client.log_metric(self.run_id, key, float(value))
        for key, value in tags.items():
            self._client.set_tag(self.run_id, key, value)
        if artifacts is not None and artifacts.exists():
            self._client.log_artifacts(self.run_id, str(artifacts), "checkpoint")
        self._client.set_terminated(self.run_id, "FINISHED")

    def fail(self, status: str = "FAILED") -> None:
        """Mark the run as failed or killed; a later attempt with the same fingerprint goes on with it."""
        self._client.set_terminated(self.run_id, status)


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
