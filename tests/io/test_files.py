"""Files and directories are whole or absent, whatever happens to the process that writes them."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crosshead.io.files import atomic_directory, atomic_path, recover_directory, write_json, write_text

OLD = {"a.txt": "old a", "b.txt": "old b"}
NEW = {"a.txt": "new a", "c/d.txt": "new d"}


def write(path: Path, content: dict[str, str]) -> None:
    with atomic_directory(path) as directory:
        for name, text in content.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(text)


def content_of(path: Path) -> dict[str, str]:
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class Killed(BaseException):
    """Stands for a process that is gone."""


def test_a_directory_takes_the_place_of_an_earlier_one_and_nothing_else_is_left(tmp_path: Path):
    write(tmp_path / "out", OLD)
    write(tmp_path / "out", NEW)
    assert content_of(tmp_path / "out") == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_the_earlier_contents(tmp_path: Path):
    write(tmp_path / "out", OLD)

    def fails() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            (directory / "a.txt").write_text("new a")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fails()
    assert content_of(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_earlier_contents(failing: int, tmp_path: Path, monkeypatch):
    write(tmp_path / "out", OLD)
    replace, calls = Path.replace, []

    def fails_once(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.EIO, "broken device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fails_once)
    with pytest.raises(OSError, match="broken device"):
        write(tmp_path / "out", NEW)
    assert content_of(tmp_path / "out") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from tests.io.test_files import NEW, write

step, calls, replace = int(sys.argv[2]), [], Path.replace

def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)

def dies_before(self, target):
    calls.append(target)
    if len(calls) == step:
        die()
    return replace(self, target)

Path.replace = dies_before
if step == 4:  # all renamed, the earlier contents not yet deleted
    shutil.rmtree = die
write(Path(sys.argv[1]), NEW)
"""


@pytest.mark.parametrize(
    ("step", "expected"), [(1, OLD), (2, OLD), (3, NEW), (4, NEW)], ids=["aside", "in place", "superseded", "deleted"]
)
def test_a_process_killed_at_any_step_leaves_old_or_new_contents_whole(step: int, expected: dict, tmp_path: Path):
    write(tmp_path / "out", OLD)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), str(step)], env=environment,
                            check=False, capture_output=True, text=True)  # fmt: skip
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert recover_directory(tmp_path / "out")
    assert content_of(tmp_path / "out") == expected
    write(tmp_path / "out", {"e.txt": "newest"})
    assert content_of(tmp_path / "out") == {"e.txt": "newest"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_deleted_contents_are_never_taken_for_whole(tmp_path: Path, monkeypatch):
    write(tmp_path / "out", OLD)

    def dies_half_way(path: Path, **_: object) -> None:
        (path / "a.txt").unlink()
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", dies_half_way)
    with pytest.raises(Killed):
        write(tmp_path / "out", NEW)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    assert not recover_directory(tmp_path / "out")


def test_there_is_nothing_to_recover_where_nothing_was(tmp_path: Path):
    assert not recover_directory(tmp_path / "out")


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path: Path):
    stale_file, stale_directory = tmp_path / f".out.{dead_pid()}.tmp", tmp_path / f".kept.{dead_pid()}.tmp"
    stale_file.write_text("half")
    stale_directory.mkdir()
    (stale_directory / "half").touch()
    live = tmp_path / f".out.{os.getppid()}.tmp"
    live.write_text("under way")
    write_text(tmp_path / "out", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", live.name, stale_directory.name}
    write(tmp_path / "kept", NEW)
    assert {path.name for path in tmp_path.iterdir()} == {"out", live.name, "kept"}


def test_names_that_look_like_patterns_are_names(tmp_path: Path):
    other = tmp_path / f".a.{dead_pid()}.tmp"
    other.touch()
    write_text(tmp_path / "[a]", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"[a]", other.name}


def test_a_failed_file_leaves_the_earlier_one(tmp_path: Path):
    write_text(tmp_path / "a.txt", "old")

    def fails() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("ne")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fails()
    assert content_of(tmp_path) == {"a.txt": "old"}


def test_a_full_disk_names_what_was_being_written_and_leaves_no_temporary(tmp_path: Path):
    write(tmp_path / "out", OLD)

    def fills_the_disk() -> None:
        with atomic_directory(tmp_path / "out") as directory:
            write_text(directory / "a.txt", "new a")
            with atomic_path(directory / "b.txt"):
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        fills_the_disk()
    assert caught.value.filename == str(tmp_path / "out")
    assert content_of(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [1.0, float("-inf")]}])
def test_numbers_that_are_not_finite_are_not_written(value: object, tmp_path: Path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match=r"a\.json is not written: a number in it is not finite"):
        write_json(tmp_path / "a.json", value)
    assert content_of(tmp_path) == {"a.json": "1\n"}
