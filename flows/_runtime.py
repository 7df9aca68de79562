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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from crosshead.io.files import fingerprint, sha256_file
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
        if run is not None and run not in (sections.get("runs") or {}):
            raise ValueError(f"{source}: runs.{run} is missing; add it or name another run")
        return cls(f"{name}@{run}" if run else name, run, source, sections)

    def section(self, key: str, config: type[Section]) -> Section:
        """One validated section."""
        return parse_section(config, self.sections.get(key) or {}, key, self.source)

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
        """Sixteen hex digits over stage, parameters, input files and all of our code that is loaded now.

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
    """Run a stage from the command line. Wrong parameters or files end with one message and exit code 2."""
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
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; run the same command to go on", file=sys.stderr)
        raise SystemExit(130) from None


def _die_with_parent() -> None:
    """Under DVC: end when DVC ends. DVC does not pass on SIGTERM, and nothing could pass on SIGKILL."""
    if sys.platform != "linux" or "DVC_STAGE" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and os.getpid() != 1:  # it had ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)
