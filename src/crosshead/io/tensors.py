"""Tensors in safetensors files: written whole or not at all, read with errors that name the file."""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from crosshead.io.files import atomic_path

__all__ = ["load_tensors", "safetensors_failures", "save_tensors"]


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors atomically, from any device. OSError when the disk is full or fails.

    They are laid out in memory first: safetensors' own writer leaves files of other names behind when it is killed,
    and hides the system's error.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def load_tensors(path: Path | str, remedy: str) -> dict[str, Tensor]:
    """Read a safetensors file. ValueError when it is missing or damaged, ending in ``remedy``: what the user can do."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {remedy}") from error


@contextmanager
def safetensors_failures(path: Path | str) -> Iterator[None]:
    """While active, a failed write of a library that uses safetensors' own writer is an OSError that names ``path``."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
