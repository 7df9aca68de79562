"""Data-driven starting points: the pieces that more than one architecture uses.

Shape legend: n sample rows, X input width, Y output width.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.dictionaries.base import Batch

__all__ = ["Moments", "counted", "ridge"]


def counted(x: Float[Tensor, "B T *rest"], batch: Batch) -> Tensor:
    """Rows of ``x`` at counted positions, flattened to two axes."""
    return x.flatten(2)[batch.mask] if x.dim() > 2 else x[batch.mask]


def ridge(x: Float[Tensor, "n X"], y: Float[Tensor, "n Y"], strength: float = 1e-3) -> Float[Tensor, "X Y"]:
    """argmin_M ||x M - y||^2 + strength * mean eigenvalue of x'x * ||M||^2, solved in float64."""
    x64, y64 = x.double(), y.double()
    gram = x64.T @ x64
    penalty = strength * gram.diagonal().mean()
    gram.diagonal().add_(penalty + 1e-12)
    return torch.linalg.solve(gram, x64.T @ y64).to(x.dtype)


class Moments:
    """Mean vector and the factor that scales centred rows to E||x||^2 = width."""

    def __init__(self, rows: Iterable[Tensor]):
        total, squares, count = 0.0, 0.0, 0
        for x in rows:
            x64 = x.double()
            total, squares, count = total + x64.sum(0), squares + float(x64.square().sum()), count + len(x)
        if not count:
            raise ValueError("no counted positions in the start sample; raise training.start_contexts")
        assert isinstance(total, Tensor)
        mean = total / count
        variance = squares / count - float(mean.square().sum())
        self.mean: Tensor = mean.float()
        self.scale: float = (len(mean) / max(variance, 1e-12)) ** 0.5
