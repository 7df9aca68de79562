"""Data-driven starting points: the pieces that more than one architecture uses.

Shape legend: n sample rows, X input width, Y output width, F features, K key/value heads, E head width.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from crosshead.dictionaries.base import Batch, Site

__all__ = ["Moments", "counted", "near_rows", "ridge", "value_map"]


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


def value_map(x: Float[Tensor, "n X"], batches: Sequence[Batch], site: Site) -> Float[Tensor, "X K E"]:
    """Ridge map from what an encoder reads at the counted positions of ``batches`` to a layer's centred values.

    The base model's own W_V, seen through its norm, up to the pull of the ridge: caches hold values, not W_V. Query
    heads that share a key/value head share its values.
    """
    value = torch.cat([b[site].float().transpose(1, 2).flatten(2)[b.mask] for b in batches])
    n_kv_heads = batches[0][site].shape[1]
    return ridge(x, value - value.mean(0)).view(x.shape[1], n_kv_heads, -1)


def near_rows(
    x: Float[Tensor, "n X"], features: int, generator: torch.Generator
) -> tuple[Float[Tensor, "F X"], Int[Tensor, " F"]]:
    """Unit vectors near random rows, and which rows: directions that cover the data.

    Random Gaussian directions leave many features dead.
    """
    chosen = torch.randint(len(x), (features,), generator=generator).to(x.device)
    noise = torch.randn(features, x.shape[1], generator=generator).to(x.device)
    return functional.normalize(functional.normalize(x[chosen], dim=1) + 0.02 * noise, dim=1), chosen


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
