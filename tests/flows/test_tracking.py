"""MLflow as a view: one run for one training however often it was interrupted, and refilled from the reports."""

import base64
import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from crosshead.params import load_params
from flows import _tracking, train
from flows._runtime import Stage
from flows._tracking import TrackedRun, database_uri, experiment_name, final_metrics, find_runs, flatten, open_client
from flows._views import add_views, saved_view
from flows.publish import publish

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ROOT / "flows/profiles/smoke/params.yaml"
LAYERS = {"first": 17, "adjacent": 18, "second": 23}


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


def record_of(name: str, **changed: object) -> dict:
    """What the stage of a smoke run would report, without its evaluation."""
    run = load_params(SMOKE).runs[name]
    config = run.dictionary_config(LAYERS)
    return {
        "run": name, "architecture": config.kind, "layers": list(config.layers), "features": config.features,
        "heads_per_feature": getattr(config, "heads_per_feature", None), "target": "attn_out", "seed": run.seed,
        "sparsity": config.sparsity.model_dump(mode="json"), "control": run.control, "steps": run.schedule.steps,
        "l0": 19.5, "normalised_mse": 0.5, "ce_recovered": None, "ce_recovered_zero": 0.5, "dead_fraction": 0.0,
        **changed,
    }  # fmt: skip


def report(record: dict) -> Path:
    path = Path(load_params(SMOKE).paths.reports, "runs", f"{record['run']}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def test_publish_fills_what_is_missing_and_nothing_twice(root: Path):
    params = load_params(SMOKE)
    home = Path(params.paths.data, "runs", "mtc-k20")
    home.mkdir(parents=True)
    (home / "history.json").write_text(json.dumps(HISTORY))
    for name in ("mtc-k20", "mtc-k60"):
        report(record_of(name))
    assert publish(params) == ["mtc-k20", "mtc-k60"]
    assert publish(params) == []
    (run,) = find_runs(open_client(), "smoke-superposition", dvc__stage="train@mtc-k20")
    assert run.data.metrics["l0"] == 19.5
    assert run.data.tags["frontier"] == "mtc"
    assert run.data.tags["layers"] == "17"


@pytest.mark.parametrize("name", ["top1-k20", "value-both-k16", "attn-out-k20"])
def test_a_published_run_has_the_parameters_and_tags_of_a_trained_one(name: str, root: Path):
    params = load_params(SMOKE)
    run = params.runs[name]
    stage = Stage.open("train", SMOKE, name)
    with train._tracked(stage, run, run.dictionary_config(LAYERS), f"identity of {name}"):
        pass
    report(record_of(name))
    assert publish(params) == [name]
    (trained,) = find_runs(open_client(), f"smoke-{run.family}", fingerprint=f"identity of {name}")
    found = find_runs(open_client(), f"smoke-{run.family}", dvc__stage=f"train@{name}")
    (published,) = [other for other in found if other.info.run_id != trained.info.run_id]
    assert published.data.params == trained.data.params
    assert "training.learning_rate" in published.data.params
    assert published.data.tags.keys() - {"record"} == trained.data.tags.keys()


def test_a_report_of_other_parameters_is_left_out_and_named(root: Path, capsys: pytest.CaptureFixture[str]):
    report(record_of("value-first-k8", features=128, steps=30))
    assert publish(load_params(SMOKE)) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert "value-first-k8.json was made with other parameters" in line
    assert "features 128, now 256; steps 30, now 40" in line
    assert "run the stage train@value-first-k8 first" in line


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed repository with what the pipeline reads and writes."""
    monkeypatch.chdir(tmp_path)
    for name in ("src/code.py", "flows/stage.py", "params.yaml", "dvc.yaml", "dvc.lock", "reports/runs/a.json",
                 "flows/profiles/smoke/dvc.lock", "flows/profiles/smoke/params.yaml", "docs/LOG.md"):  # fmt: skip
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("committed")
    git("init", "-q")
    commit()
    return tmp_path


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def commit() -> None:
    git("add", "-A")
    git("commit", "-q", "-m", "all")


@pytest.mark.parametrize("name", ["dvc.lock", "flows/profiles/smoke/dvc.lock", "reports/runs/a.json", "docs/LOG.md"])
def test_what_the_pipeline_writes_makes_no_revision_dirty(checkout: Path, name: str):
    Path(name).write_text("changed")
    assert _tracking._git_revision() == git("rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["src/code.py", "src/new.py", "flows/stage.py", "params.yaml", "dvc.yaml",
                                  "flows/profiles/smoke/params.yaml"])  # fmt: skip
def test_changed_code_and_parameters_make_the_revision_dirty(checkout: Path, name: str):
    Path(name).write_text("changed")
    assert _tracking._git_revision() == git("rev-parse", "HEAD") + "-dirty"


def test_outside_git_the_revision_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert _tracking._git_revision() == "unknown"


def test_a_published_record_belongs_to_the_commit_that_holds_it(checkout: Path):
    record = Path("reports/runs/a.json")
    holds = git("rev-parse", "HEAD")
    Path("src/code.py").write_text("changed")
    commit()
    assert _tracking.revision_of_record(record) == holds != git("rev-parse", "HEAD")
    record.write_text("of another training")
    assert _tracking.revision_of_record(record) == "unknown"
    Path(".gitignore").write_text("/ignored/\n")
    Path("ignored").mkdir()
    Path("ignored/a.json").touch()
    assert _tracking.revision_of_record(Path("ignored/a.json")) == "unknown"


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
