"""Attention patterns from queries and keys.

Shape legend: B contexts, H query heads, K key/value heads (K divides H), T positions, E head width.

A layer's *attention spec* is everything besides q and k that its softmax needs. With it the pattern is
recomputed exactly, so caches hold q and k and never a [T, T] matrix.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

__all__ = ["AttentionSpec", "attention_patterns", "attention_scores", "expand_kv", "undo_rotation"]


class AttentionSpec(BaseModel):
    """How one layer of the base model turns rotated q and k into a pattern."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_heads: Annotated[int, Field(gt=0)]
    """H, query heads."""
    n_kv_heads: Annotated[int, Field(gt=0)]
    """K, key/value heads; query head h reads key/value head h // (H // K)."""
    head_dim: Annotated[int, Field(gt=0)]
    """E, width of one head."""
    scale: float
    """Multiplies q.k before the soft-cap."""
    softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""
    sliding_window: int | None = None
    """A query sees itself and the sliding_window - 1 positions before it."""
    sinks: tuple[float, ...] | None = None
    """One extra logit per head that takes attention without moving anything (GPT-OSS)."""
    rotary: str | None = None
    """Name of the tensor pair (cos, sin) in the cache's weights file that undoes the rotation; None: no rotation."""
    rotary_interleaved: bool = False
    """Rotated coordinates pair as (0,1),(2,3)...; otherwise j pairs with j + R/2 (``undo_rotation`` asks for it)."""


def expand_kv(x_BKTE: Float[Tensor, "B K T E"], n_heads: int) -> Float[Tensor, "B H T E"]:
    """Repeat each key/value head for the query heads that share it (grouped-query attention)."""
    return x_BKTE.repeat_interleave(n_heads // x_BKTE.shape[1], dim=1)


def attention_scores(
    q_BHTE: Float[Tensor, "B H T E"], k_BKTE: Float[Tensor, "B K T E"], spec: AttentionSpec
) -> Float[Tensor, "B H T T"]:
    """Scaled, soft-capped scores; positions outside the causal mask and the window are -inf."""
    _n_contexts, n_heads, n_positions, width = q_BHTE.shape
    if (n_heads, k_BKTE.shape[1], width) != (spec.n_heads, spec.n_kv_heads, spec.head_dim):
        got = (n_heads, k_BKTE.shape[1], width)
        raise ValueError(f"q and k have (heads, kv heads, width) {got}; the attention spec says "
                         f"{(spec.n_heads, spec.n_kv_heads, spec.head_dim)}")  # fmt: skip
    scores = q_BHTE @ expand_kv(k_BKTE, n_heads).transpose(-1, -2) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    position = torch.arange(n_positions, device=q_BHTE.device)
    distance = position[:, None] - position[None, :]
    allowed = distance >= 0
    if spec.sliding_window is not None:
        allowed &= distance < spec.sliding_window
    return scores.masked_fill(~allowed, -math.inf)


def attention_patterns(
    q_BHTE: Float[Tensor, "B H T E"], k_BKTE: Float[Tensor, "B K T E"], spec: AttentionSpec
) -> Float[Tensor, "B H T T"]:
    """The layer's attention pattern A_h(t, s): causal, rows sum to 1 (to less than 1 where the spec has sinks)."""
    scores = attention_scores(q_BHTE, k_BKTE, spec)
    if spec.sinks is None:
        return scores.softmax(-1)
    sinks = torch.tensor(spec.sinks, dtype=scores.dtype, device=scores.device)
    sinks_BHT1 = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks_BHT1], -1).softmax(-1)[..., :-1]


def undo_rotation(
    x: Float[Tensor, "B heads T E"],
    cos_TR: Float[Tensor, "T R"],
    sin_TR: Float[Tensor, "T R"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "B heads T E"]:
    """Invert a rotary embedding exactly: the first R of E coordinates are rotated back, the rest pass through.

    ``cos`` and ``sin`` are those the model used (R columns, each frequency twice). ``interleaved`` is the
    pairing (0,1),(2,3)...; otherwise coordinate j pairs with j + R/2. Any attention factor folded into cos and sin
    (YaRN scaling) is divided out.
    """
    rotary_dim = cos_TR.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        even, odd = turned[..., 0::2], turned[..., 1::2]
        rotated_half = torch.stack((-odd, even), dim=-1).flatten(-2)
    else:
        half = rotary_dim // 2
        rotated_half = torch.cat((-turned[..., half:], turned[..., :half]), dim=-1)
    # cos^2 + sin^2 is 1 up to the attention factor, so dividing by it makes the inverse exact.
    original = (turned * cos_TR - rotated_half * sin_TR) / (cos_TR**2 + sin_TR**2)
    return torch.cat((original, rest), dim=-1)
