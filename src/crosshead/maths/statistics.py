"""Small statistics with their definitions."""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

__all__ = ["bootstrap_ratio_interval", "participation_ratio"]


def participation_ratio(energies: Float[Tensor, "heads n"]) -> Float[Tensor, " n"]:
    """(sum_h e_h)^2 / sum_h e_h^2 of non-negative energies: m when m heads share equally, 1 when one has all."""
    total = energies.sum(0)
    return total.square() / energies.square().sum(0).clamp(min=torch.finfo(energies.dtype).tiny)


def bootstrap_ratio_interval(
    numerator_a: ArrayLike, numerator_b: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Interval of sum(a) / sum(b) over resampled contexts, a and b paired by context (percentile bootstrap)."""
    a, b = np.asarray(numerator_a, dtype=float), np.asarray(numerator_b, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired bootstrap needs two equally long lists, got shapes {a.shape} and {b.shape}")
    picks = np.random.default_rng(seed).integers(0, len(a), size=(draws, len(a)))
    ratios = a[picks].sum(1) / b[picks].sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(low), float(high)
