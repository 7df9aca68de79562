r"""Rotary embedding for heads narrower than the base layer's: a few of its frequencies each.

Shape legend: B contexts, G groups, T positions, E width of a base head, R rotated coordinates of it, P = E // 2 pairs
of a base head, C pairs of a group.

A pair of coordinates at position t is turned by the angle w t. All tables in use are linear in t, so a pair is known by
its frequency w, and w = 0 stands for coordinates that are not rotated. Frequencies are recovered from the model's own
cos and sin and rounded to float32, which gives the model's tables back. In our heads a pair is (2c, 2c + 1).
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Tables", "base_pairs", "frequencies_of", "rotate", "tables_factor"]

Tables = tuple[Float[Tensor, "T R"], Float[Tensor, "T R"]]


def tables_factor(cos_TR: Float[Tensor, "T R"], sin_TR: Float[Tensor, "T R"]) -> float:
    """The factor that a family folds into cos and sin (YaRN); 1 for most."""
    return float((cos_TR.double()[0, 0].square() + sin_TR.double()[0, 0].square()).sqrt())


def frequencies_of(
    cos_TR: Float[Tensor, "T R"], sin_TR: Float[Tensor, "T R"], *, interleaved: bool
) -> Float[Tensor, " R/2"]:
    """Frequencies of all pairs, from tables whose angles grow linearly from 0 at position 0.

    ValueError for tables that are not of that form.
    """
    columns = slice(0, None, 2) if interleaved else slice(0, cos_TR.shape[1] // 2)
    angle = torch.atan2(sin_TR.double()[:, columns], cos_TR.double()[:, columns])
    if len(angle) < 2:
        raise ValueError(f"rotary tables of {len(angle)} position say nothing about frequencies; give two or more")
    frequency, t = angle[1].clone(), 1
    while t < len(angle) - 1:
        # Twice as far the angle says twice as much about w; how many turns it made follows from the w known so far.
        t = min(2 * t, len(angle) - 1)
        turns = ((frequency * t - angle[t]) / (2 * math.pi)).round()
        frequency = (angle[t] + 2 * math.pi * turns) / t
    position = torch.arange(len(angle), dtype=torch.float64, device=angle.device)
    off = (torch.cos(position[:, None] * frequency - angle) - 1).abs().max()
    if not off < 1e-4:
        raise ValueError(f"the rotary tables are not linear in the position (off by {float(off):.2g} in cosine); "
                         "choose a layer of another model")  # fmt: skip
    return frequency.float()


def base_pairs(width: int, rotated: int, interleaved: bool) -> Int[Tensor, "P 2"]:
    """The two coordinates of every pair of a base head: rotated pairs first, then those that pass through."""
    half = rotated // 2
    if interleaved:
        turned = torch.arange(2 * half).view(half, 2)
    else:
        turned = torch.stack([torch.arange(half), torch.arange(half) + half], 1)
    rest = torch.arange(rotated, rotated + 2 * ((width - rotated) // 2)).view(-1, 2)
    return torch.cat([turned, rest])


def rotate(x_BGTE: Float[Tensor, "B G T 2*C"], frequency_GC: Float[Tensor, "G C"]) -> Float[Tensor, "B G T 2*C"]:
    """Turn every pair (2c, 2c + 1) of every group by w t."""
    position = torch.arange(x_BGTE.shape[2], device=x_BGTE.device, dtype=frequency_GC.dtype)
    angle_GTC = position[None, :, None] * frequency_GC[:, None, :]
    cos, sin = angle_GTC.cos().to(x_BGTE.dtype), angle_GTC.sin().to(x_BGTE.dtype)
    a, b = x_BGTE[..., 0::2], x_BGTE[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
