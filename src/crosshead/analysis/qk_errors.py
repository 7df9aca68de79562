"""Errors of predicted attention scores and of the patterns they make, summed over queries and keys.

Shape legend: B contexts, G heads, T positions.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from crosshead.attention.qk_diagonal import Module, centred

__all__ = ["ScoreErrors"]


class ScoreErrors(NamedTuple):
    """Sums over pairs or queries, per context and head [B, G]."""

    squared_error: Tensor
    variance: Tensor
    pattern_error: Tensor
    pattern_variance: Tensor
    kl: Tensor
    agreement: Tensor

    @classmethod
    def of(
        cls,
        module: Module,
        predicted: Tensor,
        true: Tensor,
        allowed: Bool[Tensor, "B 1 T T"],
        mask: Bool[Tensor, "B T"],
    ) -> "ScoreErrors":
        """Predicted against true raw scores [B, G, T, T] over the allowed keys."""
        error, target = centred(predicted - true, allowed).double(), centred(true, allowed).double()
        logs = [module.positions.log_pattern(x, allowed, module.heads).double() for x in (predicted, true)]
        ours, theirs = (log.exp() * allowed for log in logs)
        counted = mask[:, None] & allowed.any(-1)
        uniform = allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        chosen = [x.masked_fill(~allowed, -torch.inf).argmax(-1) for x in (predicted, true)]
        return cls(
            error.square().sum((2, 3)),
            target.square().sum((2, 3)),
            (ours - theirs).square().sum((2, 3)),
            (theirs - uniform).square().sum((2, 3)),
            ((theirs * (logs[1] - logs[0])).sum(-1) * counted).sum(-1),
            ((chosen[0] == chosen[1]) & counted).double().sum(-1),
        )
