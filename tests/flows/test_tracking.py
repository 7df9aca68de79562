"""MLflow as a view: one run for one training however often it was interrupted, and refilled from the reports."""

import base64
import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from crosshead.params import load_params
from flows._tracking import TrackedRun, database_uri, experiment_name, final_metrics, find_runs, flatten, open_client
from flows._views import add_views, saved_view
from flows.publish import publish

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the module: creating it takes seconds."""
    return tmp_path_factory.mktemp("tracking")


@pytest.fixture(autouse=True)
def _here(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(root)


HISTORY = [{"step": step, "l0": 100.0 - step, "normalised_mse": 1.0 / step} for step in range(10, 60, 10)]
FINAL = {"l0": 60.0, "normalised_mse": 0.2, "ce_recovered": float("nan")}


def tracked(name: str = "mtc-k60", fingerprint: str = "f00") -> TrackedRun:
    return TrackedRun("superposition", name, fingerprint, parameters={"training": {"steps": 50}}, tags={"seed": "0"})


def steps(run: TrackedRun, metric: str) -> list[int]:
    return [entry.step for entry in open_client().get_metric_history(run.run_id, metric)]


def test_a_resumed_training_goes_on_in_its_run_and_logs_no_step_twice(root: Path):
    artifacts = root / "run"
    artifacts.mkdir()
    (artifacts / "weights.safetensors").write_bytes(b"weights")
    killed = tracked()
    for entry in HISTORY[:3]:
        killed.log(int(entry["step"]), entry)
    killed.fail("KILLED")
    resumed = tracked()
    assert resumed.run_id == killed.run_id
    for entry in HISTORY[2:]:
        resumed.log(int(entry["step"]), entry)
    resumed.finish(HISTORY, FINAL, artifacts)
    assert steps(resumed, "train_l0") == [10, 20, 30, 40, 50]
    stored = open_client().get_run(resumed.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["l0"] == 60.0
    assert stored.data.metrics["normalised_mse"] == 0.2
    assert stored.data.params == {"training.steps": "50"}
    assert [file.path for file in open_client().list_artifacts(resumed.run_id, "checkpoint")] == [
        "checkpoint/weights.safetensors"
    ]


def test_running_a_finished_training_again_adds_nothing(root: Path):
    again = tracked()
    again.finish(HISTORY, FINAL, root / "run")
    assert steps(again, "train_l0") == [10, 20, 30, 40, 50]
    assert len(find_runs(open_client(), "superposition", fingerprint="f00")) == 1


def test_another_fingerprint_is_another_run():
    assert tracked(fingerprint="f01").run_id != tracked().run_id


def test_parameters_are_flattened():
    assert flatten({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_the_database_lies_at_the_repository_root(root: Path):
    assert database_uri() == f"sqlite:///{root / 'mlflow.db'}"
    assert (root / "mlflow.db").exists()


def test_other_profiles_have_experiments_of_their_own():
    assert experiment_name("laptop", "superposition") == "superposition"
    assert experiment_name("smoke", "superposition") == "smoke-superposition"


def test_publish_fills_what_is_missing_and_nothing_twice(root: Path):
    params = load_params(ROOT / "flows/profiles/smoke/params.yaml")
    reports = Path(params.paths.reports, "runs")
    reports.mkdir(parents=True)
    home = Path(params.paths.data, "runs", "mtc-k20")
    home.mkdir(parents=True)
    (home / "history.json").write_text(json.dumps(HISTORY))
    for name in ("mtc-k20", "mtc-k60"):
        record = {"run": name, "architecture": "mtc", "layers": [17], "features": 512, "heads_per_feature": "all",
                  "target": "attn_out", "sparsity": {"kind": "batch_topk", "k": 20}, "control": "none", "steps": 40,
                  "tokens_trained": 9, "parameters": 8, "l0": 19.5, "normalised_mse": 0.5, "ce_recovered": None,
                  "ce_recovered_zero": 0.5, "dead_fraction": 0.0}  # fmt: skip
        (reports / f"{name}.json").write_text(json.dumps(record))
    assert publish(params) == ["mtc-k20", "mtc-k60"]
    assert publish(params) == []
    (run,) = find_runs(open_client(), "smoke-superposition", dvc__stage="train@mtc-k20")
    assert run.data.metrics["l0"] == 19.5
    assert run.data.tags["frontier"] == "mtc"
    assert run.data.tags["layers"] == "17"


CREATE = """
import sys
sys.path.insert(0, sys.argv[1])
from flows._tracking import TrackedRun
run = TrackedRun("together", sys.argv[2], sys.argv[2], parameters={}, tags={})
run.finish([], {"l0": 1.0}, __import__("pathlib").Path("none"))
"""


def test_three_processes_may_create_the_database_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    commands = [[sys.executable, "-c", CREATE, str(ROOT), name] for name in "abc"]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    (experiment,) = [e for e in open_client().search_experiments() if e.name == "together"]
    assert len(open_client().search_runs([experiment.experiment_id])) == 3


def test_every_experiment_gets_the_frontier_view_once_and_keeps_its_own_description():
    client = open_client()
    plain = client.create_experiment("with-view")
    described = client.create_experiment("with-description")
    client.set_experiment_tag(described, "mlflow.note.content", "mine")

    addresses = add_views(client)
    assert addresses["with-view"].startswith(f"#/experiments/{plain}/runs?viewStateShareKey=")
    assert "Default" not in addresses

    key, value = saved_view()
    assert addresses["with-view"].split("viewStateShareKey=")[1].split("&")[0] == key.rpartition(".")[2]
    assert client.get_experiment(plain).tags[key] == value
    assert addresses["with-view"] in client.get_experiment(plain).tags["mlflow.note.content"]
    assert client.get_experiment(described).tags["mlflow.note.content"] == "mine"

    client.set_experiment_tag(plain, key, "changed by its user")
    add_views(client)
    assert client.get_experiment(plain).tags[key] == "changed by its user"


def test_the_view_draws_the_metrics_that_runs_log():
    state = json.loads(saved_view()[1])["state"]
    charts = json.loads(zlib.decompress(base64.b64decode(state.removeprefix("deflate;"))))["compareRunCharts"]
    record = dict.fromkeys(("l0", "normalised_mse", "ce_recovered", "ce_recovered_zero", "dead_fraction"), 1.0)
    drawn = {chart[axis]["key"] for chart in charts for axis in ("xaxis", "yaxis")}
    assert drawn <= final_metrics(record).keys()
