"""Where the arithmetic runs."""

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
        """Set the threads; return the device. ValueError when cuda is asked for and absent."""
        torch.set_num_threads(self.threads)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("machine.device = cuda: this machine has no CUDA device; write auto or cpu")
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
