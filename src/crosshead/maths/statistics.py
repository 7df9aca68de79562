"""Small statistics with their definitions."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["participation_ratio"]


def participation_ratio(energies: Float[Tensor, "heads n"]) -> Float[Tensor, " n"]:
    """(sum_h e_h)^2 / sum_h e_h^2 of non-negative energies: m when m heads share equally, 1 when one has all."""
    total = energies.sum(0)
    return total.square() / energies.square().sum(0).clamp(min=torch.finfo(energies.dtype).tiny)
