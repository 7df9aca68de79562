"""Which code computes sparse products on which device."""

import importlib
import importlib.util
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product

__all__ = ["Backend", "backend", "multiplies_non_zeros_only"]


class Backend(Protocol):
    """Functions every backend has, as a module; ``on_torch`` describes them."""

    def larger_entries(self, product: Product, scale: Tensor, level: Tensor, engine: Engine) -> SparseCodes: ...
    def largest_per_row(self, product: Product, scale: Tensor, k: int, engine: Engine) -> SparseCodes: ...
    def keep_largest(self, codes: SparseCodes, scale: Tensor, count: int) -> SparseCodes: ...
    def weighted_rows(self, codes: SparseCodes, table: Tensor) -> Tensor: ...
    def weighted_columns(self, codes: SparseCodes, table: Tensor, share: Tensor, common: Tensor) -> Tensor: ...
    def decode_gradients(self, codes: SparseCodes, grad: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]: ...
    def mix(self, mixing: Mixing, out: Tensor, first: int, last: int) -> None: ...
    def unmix(self, mixing: Mixing, grad: Tensor, first: int, last: int, into: MixGradients) -> None: ...
    def apply_patterns(self, patterns: Tensor, shares: Tensor, out: Tensor) -> None: ...
    def transpose_patterns(self, patterns: Tensor, grad: Tensor, shares: Tensor) -> None: ...


def backend(device: torch.device, *, dense: bool = False) -> Backend:
    """The backend of a device, or the one that multiplies dense matrices."""
    if dense or not multiplies_non_zeros_only(device):
        return _load("on_torch")
    return _load("on_cpu" if device.type == "cpu" else "on_cuda")


def multiplies_non_zeros_only(device: torch.device) -> bool:
    """Whether there are sparse kernels for a device: the CPU, and CUDA where triton is installed."""
    return device.type == "cpu" or (device.type == "cuda" and importlib.util.find_spec("triton") is not None)


@cache
def _load(name: str) -> Any:
    """A backend is imported when it is first used: a GPU machine needs no compiler for the CPU, and the other way."""
    return importlib.import_module(f"crosshead.maths.{name}")
