"""The smoke profile from nothing to findings, in a copy of the work tree: what a stranger's first hour would show."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from crosshead.activations import machine
from crosshead.dictionaries.registry import KINDS
from flows._runtime import main
from flows.corpus import corpus
from flows.harvest import harvest
from flows.train import train
from tests.flows.interrupt import copy_of_work_tree

HOME = Path("flows/profiles/smoke")
PIPELINE = str(HOME / "dvc.yaml")
REPORTS = Path("reports/smoke")


def call(directory: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the copy, as in a fresh shell with the environment activated."""
    left_out = ("DVC_ROOT", "DVC_STAGE", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def ran(result: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^Running stage '.*:([^:']+)':", result.stdout, re.MULTILINE)


def contents(directory: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob("*")) if path.is_file()}  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_work_tree(tmp_path_factory.mktemp("smoke"))


@pytest.fixture(scope="module")
def runs(copy: Path) -> dict:
    return yaml.safe_load((copy / HOME / "params.yaml").read_text())["runs"]


@pytest.fixture(scope="module")
def attention_runs(copy: Path) -> dict:
    return yaml.safe_load((copy / HOME / "params.yaml").read_text())["attention_runs"]


@pytest.fixture(scope="module")
def finished(copy: Path) -> Path:
    call(copy, "make", "-o", ".venv/.installed", "findings", "PROFILE=smoke")
    for command in (["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "smoke"]):
        call(copy, "git", *command)
    return copy


@pytest.fixture(scope="module")
def metrics(finished: Path) -> dict:
    return json.loads((finished / REPORTS / "metrics.json").read_text())


def test_the_findings_are_there(finished: Path):
    for name in ("findings.md", "findings.html", "metrics.json"):
        assert (finished / REPORTS / name).stat().st_size > 1000
    assert list((finished / REPORTS / "figures").glob("*.png"))


def test_metrics_hold_every_run_and_the_whole_survey(metrics: dict, runs: dict):
    assert [row["run"] for row in metrics["frontier"]] == list(runs)
    assert len(metrics["survey"]) == 30 * 9
    assert metrics["clusters"]
    for row in metrics["frontier"]:
        assert 0 < row["normalised_mse"] < 1
        assert row["l0"] > 0


def test_metrics_hold_attention_runs_explanations_and_replacement_heads(metrics: dict, attention_runs: dict):
    assert [row["run"] for row in metrics["attention"]] == list(attention_runs)
    assert all(row["normalised_mse"] > 0 for row in metrics["attention"])
    [decision] = metrics["explain"]["decisions"]
    listed = sum(pair["contribution"] for pair in decision["pairs"]) + decision["rest"]
    assert decision["score"] == pytest.approx(listed + decision["base"] + decision["error"], abs=1e-3)
    assert decision["attention_after"] == pytest.approx(decision["attention_after_predicted"], abs=1e-3)
    assert {row["run"] for row in metrics["explain"]["induction"]} == {"qk-rank1-k4"}
    assert [row["run"] for row in metrics["replacements"]["heads"]] == ["arl-wide"]
    assert len(metrics["replacements"]["description_lengths"]) == 3
    assert {finding["key"] for finding in metrics["findings"]} >= {
        "qk-rank-one",
        "replacement-life",
        "replacement-width",
    }


def test_the_audit_agrees_for_every_architecture(metrics: dict):
    rows = metrics["audit"]["runs"]
    assert {row["architecture"] for row in rows} == set(KINDS)
    assert all(row["difference"] <= 1e-4 for row in rows)


def test_nothing_is_left_in_work(finished: Path):
    assert [path.name for path in (finished / "work").iterdir() if path.is_dir()] == []


def test_an_ablation_is_computed_once_for_all_runs_of_a_kind_with_the_same_targets(finished: Path, runs: dict):
    """Zero per targets, mean per targets and control, for one context: one file per architecture's code."""
    expected = []
    for kind in {run["kind"] for run in runs.values()}:
        own = [run for run in runs.values() if run["kind"] == kind]
        zeros = {tuple(run["layers"]) for run in own}
        means = {(*run["layers"], run.get("control", "none")) for run in own}
        expected.append(len(zeros) + len(means))
    found = [len(json.loads(memory.read_text())) for memory in (finished / "work").glob("ablated-*.json")]
    assert sorted(found) == sorted(expected)


def test_a_second_repro_does_nothing(finished: Path):
    again = call(finished, "make", "-o", ".venv/.installed", "findings", "PROFILE=smoke")
    assert ran(again) == []
    assert "up to date" in call(finished, "dvc", "status", PIPELINE).stdout
    assert call(finished, "git", "status", "--porcelain").stdout == ""


def test_disk_is_not_doubled(finished: Path):
    shards = list((finished / "data/smoke/cache").glob("*.arrow"))
    assert shards
    assert all(shard.stat().st_nlink >= 2 or shard.is_symlink() for shard in shards)


def test_mlflow_holds_exactly_the_runs_with_the_report_s_figures(finished: Path, metrics: dict):
    client = MlflowClient(f"sqlite:///{finished / 'mlflow.db'}")
    experiments = [e.experiment_id for e in client.search_experiments() if e.name.startswith("smoke-")]
    logged = {run.info.run_name: run.data for run in client.search_runs(experiments, max_results=1000)}
    reported = {row["run"]: row for row in (*metrics["frontier"], *metrics["attention"])}
    assert logged.keys() == reported.keys()
    for name, run in logged.items():
        for metric in ("l0", "normalised_mse", "ce_recovered"):
            assert run.metrics.get(metric) == reported[name][metric]
        assert run.tags["frontier"] == reported[name]["series"]
        assert {"git.rev", "dvc.stage", "architecture", "layers", "seed"} <= run.tags.keys()
        assert any(key.startswith("train_") for key in run.metrics)
    assert "logged 0 runs" in call(finished, "make", "-o", ".venv/.installed", "publish", "PROFILE=smoke").stdout


def test_dvc_shows_metrics_and_plots(finished: Path, runs: dict, attention_runs: dict):
    shown = call(finished, "dvc", "metrics", "show", "--json").stdout
    files = json.loads(shown)[""]["data"]
    for run in (*runs, *attention_runs):
        assert files[f"{REPORTS}/summaries/{run}.json"]["data"]["l0"] > 0
    call(finished, "dvc", "plots", "show")
    assert (finished / "dvc_plots" / "index.html").exists()


def test_touching_an_architecture_changes_only_its_own_trainings(finished: Path, runs: dict):
    source = finished / "src/crosshead/dictionaries/value_sae.py"
    before = source.read_text()
    lists = ("dvc", "repro", "--single-item", f"{PIPELINE}:code")
    source.write_text(before + "\n# touched\n")
    try:
        call(finished, *lists)
        status = json.loads(call(finished, "dvc", "status", "--json", PIPELINE).stdout)
    finally:
        source.write_text(before)
        call(finished, *lists)
    trainings = {name.rpartition("@")[2] for name in status if "train@" in name}
    assert trainings == {name for name, run in runs.items() if run["kind"] == "value_sae"}


def test_a_misspelt_parameter_stops_the_stage_and_leaves_every_output(finished: Path):
    parameters = finished / HOME / "params.yaml"
    before, outputs = parameters.read_text(), contents(finished / REPORTS) | contents(finished / "data/smoke/runs")
    parameters.write_text(before.replace("sparsity: {kind: batch_topk, k: 20}", "sparsity: {kind: batch_topk, kk: 20}"))
    try:
        direct = call(finished, "dvc", "repro", PIPELINE, check=False)
        through_make = call(finished, "make", "-o", ".venv/.installed", "findings", "PROFILE=smoke", check=False)
    finally:
        parameters.write_text(before)
    for result in (direct, through_make):
        assert result.returncode != 0
        assert "sparsity.kk is not a parameter (got 20); did you mean 'k'?" in result.stdout + result.stderr
        assert "Traceback" not in result.stdout + result.stderr
    assert contents(finished / REPORTS) | contents(finished / "data/smoke/runs") == outputs
    assert "up to date" in call(finished, "dvc", "status", PIPELINE).stdout


def changed(old: str, new: str) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return change


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


PARAMETERS, DATA = HOME / "params.yaml", Path("data/smoke")
SHARD = DATA / "cache/train-00000.arrow"
BAD_INPUTS = {
    "wrong type": (PARAMETERS, changed("splice_contexts: ", "splice_contexts: x"), train,
                   "evaluation.splice_contexts"),
    "unknown architecture": (PARAMETERS, changed("{kind: mtc,", "{kind: mct,"), train,
                             "'mct' is not an architecture"),
    "layer out of range": (PARAMETERS, changed("layers: [first]", "layers: [40]"), train, "40"),
    "context too long": (PARAMETERS, changed("context_length: ", "context_length: 999"), corpus,
                         "exceeds the model's limit"),
    "too little text": (PARAMETERS, changed("train_contexts: ", "train_contexts: 99999"), corpus, "fills only"),
    "corrupt model": (DATA / "model/model.safetensors", flipped, harvest, "model.safetensors is damaged"),
    "truncated shard": (SHARD, lambda b: b[:-9], train, "train-00000.arrow is damaged"),
    "corrupt shard": (SHARD, flipped, train, "train-00000.arrow is damaged"),
    "other corpus": (DATA / "corpus/manifest.json", changed('"fingerprint": "', '"fingerprint": "0'), train,
                     "was made with another corpus"),
    "other model": (DATA / "model/provenance.json", changed('"config.json": "', '"config.json": "0'), train,
                    "was made with another model"),
}  # fmt: skip


@pytest.fixture
def within(finished: Path, monkeypatch: pytest.MonkeyPatch, two_threads: None) -> Path:
    """The copy as the working directory of this process, for stages that run in it: a process takes long to start."""
    monkeypatch.chdir(finished)
    monkeypatch.setenv("DVC_ROOT", str(finished))
    monkeypatch.setattr(machine, "_keep_freed_memory", lambda: None)  # it would last longer than the test
    for name in ("DVC_STAGE", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return finished


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_ends_with_one_message_and_leaves_every_output(
    case: str, within: Path, capfd: pytest.CaptureFixture[str]
):
    name, change, stage, message = BAD_INPUTS[case]
    path = within / name
    outputs = contents(within / REPORTS) | contents(within / "data/smoke/runs")
    kept = path.with_name(f"{path.name}.kept")  # aside, not overwritten: data files are links into the cache
    path.rename(kept)
    path.write_bytes(change(kept.read_bytes()))
    run = ["--run", "mtc-k20"] if stage is train else []
    try:
        with pytest.raises(SystemExit) as ended:
            main(stage, arguments=["--params", str(PARAMETERS), *run])
    finally:
        kept.replace(path)
    said = capfd.readouterr().err
    assert ended.value.code == 2, said
    assert message in said
    assert "Traceback" not in said
    assert contents(within / REPORTS) | contents(within / "data/smoke/runs") == outputs


def test_an_experiment_with_one_sparsity_retrains_one_run(finished: Path, runs: dict):
    """Last in this file: it changes the copy."""
    target = f"{PIPELINE}:train@mtc-k20"
    override = f"{HOME}/params.yaml:runs.mtc-k20.sparsity.k=25"
    result = call(finished, "dvc", "exp", "run", "-S", override, target)
    assert ran(result) == ["train@mtc-k20"]
    status = json.loads(call(finished, "dvc", "status", "--json", PIPELINE).stdout)
    assert not [name for name in status if "train@" in name]
    record = json.loads((finished / REPORTS / "runs/mtc-k20.json").read_text())
    assert record["sparsity"]["k"] == 25
