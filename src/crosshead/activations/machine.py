"""Where the arithmetic runs."""

import ctypes
from contextlib import suppress
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Machine"]


class Machine(BaseModel):
    """Device and threads of a stage. Part of a result's identity: sums depend on how many threads share them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: cuda where there is one."""
    threads: Annotated[int, Field(gt=0)] = 2
    """Threads of the tensor library on the CPU."""

    def prepare(self) -> str:
        """Set the threads, keep freed memory; return the device. ValueError when cuda is asked for and absent."""
        torch.set_num_threads(self.threads)
        _keep_freed_memory()
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("machine.device = cuda: this machine has no CUDA device; write auto or cpu")
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device


def _keep_freed_memory() -> None:
    """Tell glibc to hand freed memory to the next tensor instead of the system.

    Every training step frees gradients as large as the weights. Getting fresh pages for them each time took a third of
    a backward pass with 32,768 features.
    """
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
