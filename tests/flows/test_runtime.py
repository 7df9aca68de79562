"""What every stage gets from the runtime: messages, exit codes, work that survives a kill, an end with its parent."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from crosshead.io.files import atomic_path
from flows._runtime import Stage, main, repository_root

SECTIONS = {
    "profile": "tiny",
    "paths": {"data": "data/tiny", "reports": "reports/tiny"},
    "machine": {"threads": 1},
    "runs": {"a": {"kind": "mtc"}},
}


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(SECTIONS))
    return path


def fails(stage: Stage) -> None:
    raise ValueError(f"{stage.source}: x = 3: too large; lower it")


def works(stage: Stage) -> None:
    Path("done").write_text(f"{stage.name} {stage.profile} {stage.data} {stage.reports}")


def run(body, *arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(body, arguments=list(arguments))
    return caught.value.code


def test_a_stage_gets_its_name_and_paths(params: Path):
    main(works, arguments=["--params", "params.yaml", "--run", "a"])
    assert Path("done").read_text() == "works@a tiny data/tiny reports/tiny"


def test_a_value_error_ends_with_one_message_and_exit_code_2(params: Path, capsys: pytest.CaptureFixture):
    assert run(fails, "--params", "params.yaml") == 2
    assert capsys.readouterr().err == "fails: params.yaml: x = 3: too large; lower it\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_with_a_remedy_and_may_be_tried_again(params: Path, capsys: pytest.CaptureFixture, code: int):
    def fills_the_disk(stage: Stage) -> None:
        with atomic_path(stage.data / "shard.arrow"):
            raise OSError(code, os.strerror(code))

    assert run(fills_the_disk, "--params", "params.yaml") == 1
    assert capsys.readouterr().err == (
        "fills_the_disk: the disk is full while writing data/tiny/shard.arrow; free some space and run the same "
        "command again, it goes on where it stopped\n"
    )


def test_what_the_machine_may_mend_exits_with_1_and_what_is_wrong_with_2(params: Path, capsys: pytest.CaptureFixture):
    def fails_with(error: Exception):
        def body(stage: Stage) -> None:
            raise error

        return body

    assert run(fails_with(ConnectionError("pip could not download a==1; check")), "--params", "params.yaml") == 1
    assert capsys.readouterr().err == "body: pip could not download a==1; check\n"
    assert run(fails_with(FloatingPointError("the loss is nan; lower it")), "--params", "params.yaml") == 2
    assert capsys.readouterr().err == "body: the loss is nan; lower it\n"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"profile": 3}, "profile = 3 is no name"),
        ({"paths": "data"}, "paths = 'data': data must be a path in a mapping"),
        ({"paths": {"data": "data"}}, "reports must be a path in a mapping"),
        ({"runs": ["a"]}, "runs = ['a'] is not a mapping"),
        ({"dictionaries": 3}, "dictionaries = 3 is not a mapping"),
        ({"runs": {"a": {"kind": ["mtc"]}}}, "runs.a.kind = ['mtc'] is no name of an architecture"),
    ],
)
def test_a_parameter_file_of_the_wrong_shape_is_refused(
    params: Path, capsys: pytest.CaptureFixture, sections: dict, said: str
):
    params.write_text(yaml.safe_dump(SECTIONS | sections))
    assert run(works, "--params", "params.yaml", "--run", "a") == 2
    message = capsys.readouterr().err
    assert message.startswith("works: params.yaml: ")
    assert said in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--params", "none.yaml"), "none.yaml does not exist"),
        (("--params", "params.yaml", "--run", "b"), "runs.b is missing"),
    ],
)
def test_a_missing_file_or_run_is_named(params: Path, capsys: pytest.CaptureFixture, arguments: tuple, said: str):
    assert run(works, *arguments) == 2
    assert said in capsys.readouterr().err


def test_identity_follows_parameters_and_inputs_only(params: Path):
    stage = Stage.open("train", params, "a")
    source = Path("input.json")
    source.write_text("1")
    before = stage.identity(("machine",), (source,))
    assert before == Stage.open("train", params, "a").identity(("machine",), (source,))
    source.write_text("2")
    changed_input = stage.identity(("machine",), (source,))
    params.write_text(yaml.safe_dump(SECTIONS | {"machine": {"threads": 2}}))
    changed_parameter = Stage.open("train", params, "a").identity(("machine",), (source,))
    assert len({before, changed_input, changed_parameter}) == 3


def test_work_stays_after_an_error_and_goes_after_success(params: Path):
    stage = Stage.open("train", params)

    def is_interrupted() -> None:
        with stage.work("f00") as work:
            (work / "checkpoint").write_text("step 3")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        is_interrupted()
    with stage.work("f00") as work:
        assert work == repository_root() / "work" / "f00"
        assert (work / "checkpoint").read_text() == "step 3"
    assert not work.exists()


HOLD = """
import sys, time
from pathlib import Path
from flows._runtime import Stage
with Stage.open("train", Path("params.yaml")).work("f00") as work:
    assert not (work / "busy").exists()
    (work / "busy").touch()
    print("holding", flush=True)
    time.sleep(float(sys.argv[1]))
    (work / "busy").unlink()
"""


def python(script: str, *arguments: str, **options) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), **options}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_never_hold_the_same_work(params: Path):
    first = python(HOLD, "1")
    assert first.stdout is not None
    first.stdout.readline()
    second, third = python(HOLD, "0"), python(HOLD, "0")
    errors = [process.communicate(timeout=60)[1] for process in (first, second, third)]
    assert [process.returncode for process in (first, second, third)] == [0, 0, 0], errors
    assert "another process works on the same state" in errors[1]


def test_work_is_free_again_when_its_holder_is_killed(params: Path):
    first = python(HOLD, "60")
    assert first.stdout is not None
    first.stdout.readline()
    first.kill()
    first.wait()
    with Stage.open("train", params).work("f00") as work:
        assert (work / "busy").exists()


CHILD = """
import time
from flows._runtime import main
def body(stage):
    print("started", flush=True)
    time.sleep(60)
main(body, arguments=["--params", "params.yaml"])
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_a_stage_ends_when_dvc_is_killed(params: Path):
    parent = python(PARENT, DVC_STAGE="body")
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{child}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the stage outlived its parent")
