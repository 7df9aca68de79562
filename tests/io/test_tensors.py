"""Tensors on disk: whole or absent, a full disk told as such, damage told with the file's name."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from crosshead.io.tensors import load_tensors, safetensors_failures, save_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2]), "t": torch.arange(6.0).view(2, 3).T}


def test_tensors_come_back_as_they_were_and_the_file_is_an_ordinary_one(tmp_path: Path):
    save_tensors(tmp_path / "x.safetensors", TENSORS)
    for loaded in (load_tensors(tmp_path / "x.safetensors", "train again"), load_file(tmp_path / "x.safetensors")):
        assert loaded.keys() == TENSORS.keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "y.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


@pytest.mark.parametrize("damage", [lambda content: content[:-4], lambda content: content[:3], lambda content: b""])
def test_a_damaged_file_is_named_with_the_remedy(damage, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read .*; train again$"):
        load_tensors(path, "train again")


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read .*; train again$"):
        load_tensors(tmp_path / "x.safetensors", "train again")


# A limit on the size of files fails a write in the middle, as a full disk does, without filling one.
LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from crosshead.io.tensors import safetensors_failures, save_tensors
from safetensors.torch import save_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
path = Path(sys.argv[1])
try:
    if sys.argv[2] == "ours":
        save_tensors(path, {"a": torch.ones(10_000)})
    else:
        with safetensors_failures(path):
            save_file({"a": torch.ones(10_000)}, path)
except OSError as error:
    print(error.errno)
"""


@pytest.mark.parametrize("writer", ["ours", "library"])
def test_a_write_that_the_system_cuts_off_is_an_os_error_and_leaves_the_earlier_file(writer: str, tmp_path: Path):
    save_tensors(tmp_path / "x.safetensors", TENSORS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "x.safetensors"), writer], env=environment,
                            check=True, capture_output=True, text=True)  # fmt: skip
    assert int(result.stdout) == errno.EFBIG
    assert torch.equal(load_tensors(tmp_path / "x.safetensors", "")["a"], TENSORS["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("Error while serializing: I/O error: No space left on device (os error 28)", errno.ENOSPC),
        ("Error while serializing: something else", errno.EIO),
    ],
)
def test_the_library_s_own_failures_become_os_errors_with_their_number(message: str, code: int, tmp_path: Path):
    with pytest.raises(OSError, match="model") as caught, safetensors_failures(tmp_path / "model"):
        raise SafetensorError(message)
    assert (caught.value.errno, caught.value.filename) == (code, str(tmp_path / "model"))
