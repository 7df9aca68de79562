"""What every stage needs around its own few lines: arguments, parameters, resumable work, errors, Prefect.

``python -m flows.<stage> --params <file> [--run <name>]`` runs from the repository root, as DVC does. The stage runs as
a Prefect flow when PREFECT_API_URL names a server, and as a plain function otherwise: a flow without a server would
start one of its own, ten seconds for every stage.
"""

import argparse
import ctypes
import fcntl
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from crosshead.io.files import FULL_DISK, fingerprint, sha256_file
from crosshead.io.settings import parse_section, read_sections

__all__ = ["Stage", "main", "repository_root"]

Section = TypeVar("Section", bound=BaseModel)
_PR_SET_PDEATHSIG = 1


def repository_root() -> Path:
    """The repository whose work/ and MLflow database are used; DVC names it when an experiment runs elsewhere."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).resolve().parents[1])


@dataclass(frozen=True)
class Stage:
    """One stage of one profile."""

    name: str
    """As in dvc.yaml, e.g. ``train@mtc-k60``."""
    run: str | None
    """Name of the training run, where the stage has one."""
    source: Path
    """The profile's parameter file."""
    sections: dict[str, Any]
    """Its contents, not yet validated."""

    @classmethod
    def open(cls, name: str, source: Path, run: str | None = None) -> "Stage":
        """Read the parameter file. ValueError when it cannot be read or has no such run."""
        sections = read_sections(source)
        for needed in ("profile", "paths"):
            if needed not in sections:
                raise ValueError(f"{source}: {needed} is missing; every profile has it, see params.yaml")
        _check_shape(sections, source)
        if run is not None:
            _check_run(run, sections, source)
        return cls(f"{name}@{run}" if run else name, run, source, sections)

    def section(self, key: str, config: type[Section]) -> Section:
        """One validated section."""
        value = self.sections.get(key)
        return parse_section(config, {} if value is None else value, key, self.source)

    @property
    def profile(self) -> str:
        """Name of the profile."""
        return str(self.sections["profile"])

    @property
    def data(self) -> Path:
        """Where the profile's outputs lie."""
        return Path(self.sections["paths"]["data"])

    @property
    def reports(self) -> Path:
        """Where the profile's reports and metrics lie."""
        return Path(self.sections["paths"]["reports"])

    def identity(self, keys: tuple[str, ...], inputs: tuple[Path, ...]) -> str:
        """Sixteen hex digits over stage, parameters, input files, all our code that is loaded, and what computes.

        Without the Prefect side: a run that was killed may go on with another server, or with none.
        """
        files = {getattr(module, "__file__", None) for name, module in list(sys.modules.items())
                 if name.split(".")[0] in ("crosshead", "flows", "__main__") and name != "flows._prefect"}  # fmt: skip
        return fingerprint({
            "stage": self.name,
            "profile": self.profile,
            "parameters": {key: self._value(key) for key in keys},
            "inputs": {str(path): sha256_file(path) for path in inputs},
            "code": sorted(sha256_file(file) for file in files if file),
            "versions": {package: version(package) for package in ("torch", "transformers")},
        })  # fmt: skip

    def _value(self, key: str) -> Any:
        value: Any = self.sections
        for part in key.split("."):
            value = (value or {}).get(part)
        return value

    @contextmanager
    def work(self, identity: str) -> Iterator[Path]:
        """A directory for resumable state, held by one process at a time and removed once the stage has finished."""
        with _held_directory(repository_root() / "work" / identity, self.name) as directory:
            yield directory
            shutil.rmtree(directory)


def _check_shape(sections: Mapping[str, Any], source: Path) -> None:
    """What a stage takes for granted of sections that it reads without a config."""
    if not isinstance(sections["profile"], str):
        raise ValueError(f"{source}: profile = {sections['profile']!r} is no name; write e.g. laptop")
    paths = sections["paths"]
    for needed in ("data", "reports"):
        if not isinstance(paths, dict) or not isinstance(paths.get(needed), str):
            raise ValueError(f"{source}: paths = {paths!r}: {needed} must be a path in a mapping; see params.yaml")
    for name in ("dictionaries", "runs"):
        if not isinstance(sections.get(name) or {}, dict):
            raise ValueError(f"{source}: {name} = {sections[name]!r} is not a mapping of names to parameters; "
                             "correct it")  # fmt: skip


def _check_run(run: str, sections: Mapping[str, Any], source: Path) -> None:
    runs = sections.get("runs") or {}
    if run not in runs:
        raise ValueError(f"{source}: runs.{run} is missing; add it or name another run")
    kind = runs[run].get("kind") if isinstance(runs[run], dict) else None
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"{source}: runs.{run}.kind = {kind!r} is no name of an architecture; correct it")


@contextmanager
def _held_directory(path: Path, name: str) -> Iterator[Path]:
    """A directory that no other process holds. Its former holder may have removed it while we waited: then again."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _flock(descriptor, f"{name}: another process works on the same state ({path}); waiting for it to end")
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
                yield path
                return
        finally:
            os.close(descriptor)


@contextmanager
def lock(path: Path, waiting: str) -> Iterator[None]:
    """Hold an exclusive lock on a file. Says ``waiting`` if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        _flock(handle.fileno(), waiting)
        yield


def _flock(descriptor: int, waiting: str) -> None:
    """Lock an open file; the lock ends with the process, however that ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(waiting, file=sys.stderr, flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def main(body: Callable[[Stage], None], *, arguments: list[str] | None = None) -> None:
    """Run a stage from the command line. What the user or the machine can do ends with one message.

    Exit code 2 says that another attempt would fail as well (wrong parameters or files), 1 that it may not: the
    network, the disk or another part of the machine failed.
    """
    name = body.__name__
    parser = argparse.ArgumentParser(prog=f"python -m flows.{name}", description=body.__doc__)
    parser.add_argument("--params", type=Path, required=True, help="the profile's parameter file")
    parser.add_argument("--run", help="name of the training run, for stages that have one per run")
    options = parser.parse_args(arguments)
    _die_with_parent()
    try:
        stage = Stage.open(name, options.params, options.run)
        if os.environ.get("PREFECT_API_URL"):
            from flows._prefect import run_as_flow

            run_as_flow(body, stage)
        else:
            body(stage)
    except OSError as error:
        print(f"{name}: {_in_words(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except (ValueError, FloatingPointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _in_words(error: OSError) -> str:
    if error.errno not in FULL_DISK:
        return str(error)
    return (f"the disk is full while writing {error.filename or 'an output'}; free some space and run the same command "
            "again, it goes on where it stopped")  # fmt: skip


def _die_with_parent() -> None:
    """Under DVC: end when DVC ends. DVC does not pass on SIGTERM, and nothing could pass on SIGKILL."""
    if sys.platform != "linux" or "DVC_STAGE" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and os.getpid() != 1:  # it had ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)
