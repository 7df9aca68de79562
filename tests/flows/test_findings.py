"""The parent flow on a cheap pipeline of its own: DVC must not notice who ran its stages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("prefect")
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import Failed, Running
from prefect.task_runners import ThreadPoolTaskRunner
from prefect.testing.utilities import prefect_test_harness

from flows import _prefect
from flows import findings as parent
from flows._tracking import open_client

ROOT = Path(__file__).resolve().parents[2]
STAGE = """
import json, os, pathlib, sys, time
name, seconds = sys.argv[1], float(sys.argv[2])
pathlib.Path("pid-" + name).write_text(str(os.getpid()))
begin = time.time()
time.sleep(seconds)
out = pathlib.Path("data", name)
out.mkdir(parents=True, exist_ok=True)
(out / "out.txt").write_text(name)
pathlib.Path("spans").mkdir(exist_ok=True)
pathlib.Path("spans", name + ".json").write_text(json.dumps([begin, time.time()]))
with open("tries-" + name, "a") as tries:
    tries.write("x")
once = pathlib.Path("fail-" + name)
if once.exists():
    code = int(once.read_text())
    once.unlink()
    sys.exit(code)
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
    Path(".gitignore").write_text("/data/\n/work/\n/spans/\n/mlflow.db\n/mlartifacts/\n")
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


@pytest.mark.parametrize(("stage", "run"), [
    ("train@mtc-k60", "mtc-k60"), ("flows/profiles/smoke/dvc.yaml:attention@arl-wide", "arl-wide"),
    ("attention", None), ("report", None), ("flows/profiles/smoke/dvc.yaml:code", None),
])  # fmt: skip
def test_both_kinds_of_training_are_told_from_other_stages(stage: str, run: str | None):
    assert parent._training(stage) == run


def test_two_trainings_at_once_leave_dvc_status_clean(repository: Path):
    outcome = run(workers=2)
    assert set(outcome.values()) == {"done"}
    assert json.loads(dvc("status", "--json")) == {}
    assert "didn't change" in dvc("repro")
    first, second = sorted([span("a"), span("b"), span("c")])[:2]
    assert second[0] < first[1], "the first two trainings did not overlap"
    assert span("report")[0] > max(span(name)[1] for name in "abc")


def test_a_second_flow_runs_nothing(repository: Path):
    Path("dvc.yaml").write_text(PIPELINE.replace("${item} 4", "${item} 0"))
    run(workers=2)
    before = time.time()
    assert set(run(workers=1).values()) == {"unchanged"}
    assert all(span(name)[1] < before for name in "abc")


def test_a_stage_that_fails_once_is_tried_again(repository: Path):
    Path("fail-b").write_text("1")
    Path("dvc.yaml").write_text(PIPELINE.replace("${item} 4", "${item} 0"))
    assert run(workers=1)["train@b"] == "done"
    assert Path("tries-b").read_text() == "xx"
    assert json.loads(dvc("status", "--json")) == {}


def test_a_stage_with_wrong_parameters_is_tried_once(repository: Path):
    Path("fail-source").write_text("2")
    with pytest.raises(parent.StageFailedError, match="source failed; 4 stages that need them were not run"):
        run(workers=1)
    assert Path("tries-source").read_text() == "x"


def _interruptible() -> None:
    """Interrupts end the process even where this suite was started in the background, which ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_sigterm_ends_flow_dvc_and_stage_and_says_so_once(repository: Path):
    Path("dvc.yaml").write_text(PIPELINE.replace("${item} 4", "${item} 900"))
    environment = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value(), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "flows.findings"], env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, preexec_fn=_interruptible)  # fmt: skip
    deadline = time.monotonic() + 300
    while not Path("pid-a").exists() and not Path("pid-b").exists() and not Path("pid-c").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    stage = next(path for path in (Path(f"pid-{name}") for name in "abc") if path.exists())
    time.sleep(0.5)
    process.terminate()
    output = process.communicate(timeout=300)[0]  # a third of what the stage takes: it is not waited for
    assert process.returncode == 130
    assert output.count("interrupted; run the same command to go on") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(stage.read_text()), 0)


@pytest.mark.parametrize(
    ("printed", "code", "again"),
    [
        ("ERROR: failed to reproduce 'train@b': failed to run: exec python, exited with 2", 2, False),
        ("ERROR: failed to reproduce 'train@b': failed to run: exec python, exited with 1", 1, True),
        ("ERROR: failed to reproduce 'train@b': failed to run: exec python, exited with 255", 255, True),
        ("ERROR: failed to reproduce 'train@b': failed to run: exec python, exited with 130", 130, False),
        ("ERROR: failed to reproduce 'train@b': failed to run: exec python, exited with -9", -9, True),
        (
            "the stage's own helper exited with 2\nERROR: failed to reproduce 'a': failed to run: b, exited with 1",
            1,
            True,
        ),
        ("ERROR: output 'data/b' is already specified in stages", None, True),
    ],
)
def test_exactly_wrong_parameters_and_interrupts_are_not_worth_another_try(printed: str, code: int | None, again: bool):
    found = parent._exit_code(f"Running stage 'train@b':\n{printed}\n")
    assert found == code
    state = Failed(data=parent.StageFailedError(printed, found))
    assert parent._worth_another_try(None, None, state) is again


PARAMETERS = """
profile: toy
paths: {reports: reports}
runs:
  a: {family: superposition}
  b: {family: superposition}
  c: {family: value-layers}
"""


def artifacts(key: str) -> list[dict]:
    """All versions of an artifact, the first one first."""
    wanted = {"artifacts": {"key": {"any_": [key]}}, "sort": "CREATED_DESC"}
    with get_client(sync_client=True) as client:
        return client.request("POST", "/artifacts/filter", json=wanted).json()[::-1]


def test_results_appear_while_the_flow_runs(repository: Path):
    Path("params.yaml").write_text(PARAMETERS)
    Path("dvc.yaml").write_text(PIPELINE.replace("${item} 4", "${item} 0"))
    Path("reports/summaries").mkdir(parents=True)
    Path("reports/findings.md").write_text("# Findings of the toy")
    for name in "abc":
        Path(f"reports/summaries/{name}.json").write_text(json.dumps({"l0": 60.0}))
    open_client().create_experiment("toy-superposition")
    before = len(artifacts("runs"))
    run(workers=1)
    tables = [json.loads(version["data"]) for version in artifacts("runs")[before:]]
    ended = [[row["run"] for row in table if row.get("l0") == 60.0 and row["state"] == "done"] for table in tables]
    assert [len(runs) for runs in ended] == [1, 2, 3, 3], "one version for every training, one at the end"
    text = artifacts("findings")[-1]["data"]
    assert "# Findings of the toy" in text
    assert str(repository / "reports" / "findings.html") in text
    link = artifacts("frontier-superposition")[-1]
    assert "http://127.0.0.1:5000/#/experiments/" in link["data"]
    assert "make ui" in link["description"]
    assert not artifacts("frontier-value-layers"), "no experiment, no link"


def test_killed_flow_runs_and_their_tasks_are_marked_as_crashed():
    @task
    def stage() -> None: ...

    @flow
    def killed() -> None: ...

    @flow
    def alive() -> None: ...

    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host, own = _prefect.process_tags()
    with get_client(sync_client=True) as client:
        runs = {
            name: client.create_flow_run(of, tags=[host_tag, pid], state=Running())
            for name, of, host_tag, pid in [
                ("killed", killed, host, f"pid:{ended.pid}"),
                ("alive", alive, host, own),
                ("elsewhere", killed, "host:another", f"pid:{ended.pid}"),
            ]
        }
        tasks = {
            name: client.create_task_run(stage, flow_run.id, dynamic_key="0", state=Running())
            for name, flow_run in runs.items()
        }
        assert _prefect.reap_killed_runs() == 1
        states = {name: client.read_flow_run(flow_run.id).state_name for name, flow_run in runs.items()}
        assert states == {"killed": "Crashed", "alive": "Running", "elsewhere": "Running"}
        assert {name: client.read_task_run(task_run.id).state_name for name, task_run in tasks.items()} == states
        assert _prefect.reap_killed_runs() == 0


def test_a_stage_that_keeps_failing_stops_only_those_that_need_it(repository: Path):
    Path("dvc.yaml").write_text(
        PIPELINE.replace("python stage.py ${item} 4", "test ${item} != b && python stage.py ${item} 0")
    )
    with pytest.raises(parent.StageFailedError, match="train@b failed; 1 stages that need them were not run"):
        run(workers=1)
    assert Path("data/a/out.txt").exists()
    assert Path("data/c/out.txt").exists()
    assert not Path("data/report").exists()
