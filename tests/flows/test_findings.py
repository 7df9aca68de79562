"""The parent flow on a cheap pipeline of its own: DVC must not notice who ran its stages."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("prefect")
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.testing.utilities import prefect_test_harness

from flows import findings as parent

STAGE = """
import json, pathlib, sys, time
name, seconds = sys.argv[1], float(sys.argv[2])
begin = time.time()
time.sleep(seconds)
out = pathlib.Path("data", name)
out.mkdir(parents=True, exist_ok=True)
(out / "out.txt").write_text(name)
pathlib.Path("spans").mkdir(exist_ok=True)
pathlib.Path("spans", name + ".json").write_text(json.dumps([begin, time.time()]))
once = pathlib.Path("fail-" + name)
if once.exists():
    once.unlink()
    sys.exit(1)
"""

PIPELINE = """
stages:
  source:
    cmd: python stage.py source 0
    outs: [{data/source: {persist: true}}]
  train:
    foreach: [a, b, c]
    do:
      cmd: python stage.py ${item} 4
      deps: [data/source]
      outs: [{"data/${item}": {persist: true}}]
  report:
    cmd: python stage.py report 0
    deps: [data/a, data/b, data/c]
    outs: [{data/report: {persist: true}}]
"""


def dvc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def server():
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setattr(parent.reproduce, "retry_delay_seconds", 0)
    subprocess.run(["git", "init", "-q"], check=True)
    dvc("init", "-q")
    dvc("config", "core.analytics", "false")
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(PIPELINE)
    Path(".gitignore").write_text("/data/\n/work/\n/spans/\n")
    return tmp_path


def run(workers: int) -> dict[str, str]:
    runner = ThreadPoolTaskRunner(max_workers=workers)
    return parent.findings.with_options(task_runner=runner)("dvc.yaml", workers)


def span(name: str) -> list[float]:
    return json.loads(Path("spans", f"{name}.json").read_text())


def test_the_graph_names_every_stage_after_the_stages_it_needs(repository: Path):
    graph = parent.stage_graph(Path("dvc.yaml"))
    assert next(iter(graph)) == "source"
    assert list(graph)[-1] == "report"
    assert graph["report"] == {"train@a", "train@b", "train@c"}


def test_two_trainings_at_once_leave_dvc_status_clean(repository: Path):
    outcome = run(workers=2)
    assert set(outcome.values()) == {"done"}
    assert json.loads(dvc("status", "--json")) == {}
    assert "didn't change" in dvc("repro")
    first, second = sorted([span("a"), span("b"), span("c")])[:2]
    assert second[0] < first[1], "the first two trainings did not overlap"
    assert span("report")[0] > max(span(name)[1] for name in "abc")


def test_a_second_flow_runs_nothing(repository: Path):
    run(workers=2)
    before = time.time()
    assert set(run(workers=1).values()) == {"unchanged"}
    assert all(span(name)[1] < before for name in "abc")


def test_a_stage_that_fails_once_is_tried_again(repository: Path):
    Path("fail-b").touch()
    assert run(workers=1)["train@b"] == "done"
    assert json.loads(dvc("status", "--json")) == {}


def test_a_stage_that_keeps_failing_stops_only_those_that_need_it(repository: Path):
    Path("dvc.yaml").write_text(
        PIPELINE.replace("python stage.py ${item} 4", "test ${item} != b && python stage.py ${item} 0")
    )
    with pytest.raises(parent.StageFailedError, match="train@b failed; 1 stages that need them were not run"):
        run(workers=1)
    assert Path("data/a/out.txt").exists()
    assert Path("data/c/out.txt").exists()
    assert not Path("data/report").exists()
