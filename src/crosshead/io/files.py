"""Files that are either whole or absent: write to a temporary name beside the target, fsync, rename.

Temporary names are ``.<name>.<pid>.tmp``. What a killed process left under one is removed by the next writer of the
same target. A directory cannot be renamed over another, so an earlier one stands as ``.<name>.old`` for the moment
between two renames; whoever finds it without its successor puts it back (``recover_directory``).
"""

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "FULL_DISK",
    "atomic_directory",
    "atomic_path",
    "fingerprint",
    "process_lives",
    "read_json",
    "recover_directory",
    "sha256_file",
    "write_json",
    "write_text",
]

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk or a quota that is used up."""


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it onto ``path``.

    On any error the temporary file is removed and an existing ``path`` stays as it was. OSError for a full disk names
    ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with _naming_a_full_disk(path):
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; on success fsync it and let it take the place of ``path``.

    For one writer of ``path`` at a time.

    On any error the temporary directory is removed and an existing ``path`` stays as it was. A process killed at any
    point leaves the earlier or the new contents, whole, for ``recover_directory``. OSError for a full disk names
    ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    temporary = _temporary(path)
    _remove(temporary)
    temporary.mkdir()
    try:
        with _naming_a_full_disk(path):
            yield temporary
            _sync_tree(temporary)
            if path.exists():
                path.replace(_earlier(path))
            temporary.replace(path)
            _sync(path.parent)
    finally:
        # Deleting takes many steps, so it is done under a temporary name: what is left of it is never taken for whole.
        recover_directory(path)
        _remove(temporary)


def recover_directory(path: Path | str) -> bool:
    """Finish what a killed ``atomic_directory`` left of ``path``; True when ``path`` exists afterwards.

    Earlier contents that were moved aside are put back where no new ones took their place, and removed otherwise.
    """
    path = Path(path)
    earlier = _earlier(path)
    if os.path.lexists(earlier):
        if path.exists():
            superseded = _temporary(path)
            _remove(superseded)
            earlier.replace(superseded)
            _remove(superseded)
        else:
            earlier.replace(path)
    return path.exists()


def _earlier(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _temporary(path: Path) -> Path:
    """The temporary name of this process for ``path``; what dead processes left under theirs is removed."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = stale.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if pid.isdecimal() and not process_lives(int(pid)):
            _remove(stale)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def process_lives(pid: int) -> bool:
    """Whether a process of this host has this number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file or a directory tree, as far as it exists and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    """Bring a file or a directory's entries to the disk, so that a rename never outlives what it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming_a_full_disk(path: Path) -> Iterator[None]:
    """Add what was being written to the error of a full disk: the system names no file when a write fails."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK:
            error.filename = str(path)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, keys sorted, floats as Python prints them; NaN and infinity are refused (ValueError)."""
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is not written: a number in it is not finite ({error}); look for the division or "
                         "the loss it came from") from error  # fmt: skip
    write_text(path, text + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; a missing or damaged file raises ValueError naming the path."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; run the stage that writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it and run its stage again") from None


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's bytes."""
    with Path(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that identify a JSON-able value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
