"""Attention of very many heads in bounded memory.

Shape legend: B contexts, G heads (or groups that share a pattern), T positions, E width of queries and keys, W width of
values.

A few heads at a time, so that no [B, G, T, T] tensor exists and the memory of a step grows with B T G (E + W) only.
Without a pattern penalty a part is one call of scaled_dot_product_attention, whose CPU kernel holds no pattern; with
one, patterns are built explicitly, and computed again in the backward pass. So is every part on a GPU, where the kernel
that is chosen may hold them.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

__all__ = ["Attended", "allowed_keys", "attend", "heads_at_a_time", "pattern_costs", "patterns"]


class Attended(NamedTuple):
    """What heads bring to every position."""

    z_BGTW: Float[Tensor, "B G T W"]
    cost: Float[Tensor, ""] | None
    """Sum over heads and counted positions of what the pattern penalty charges for a row; None without one."""


def allowed_keys(mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B 1 T T"] | None:
    """Keys that a query may see: the first token, and those up to its own that count. None: all up to its own."""
    if bool(mask[:, 1:].all()):
        return None
    seen = mask.clone()
    seen[:, 0] = True
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=mask.device).tril()
    return (causal & seen[:, None, :])[:, None]


def heads_at_a_time(n_contexts: int, n_positions: int, itemsize: int, limit_mib: float) -> int:
    """How many heads' patterns fit into ``limit_mib``; at least one."""
    return max(1, int(limit_mib * 2**20 / (n_contexts * n_positions**2 * itemsize)))


def patterns(
    q_BGTE: Float[Tensor, "B G T E"],
    k_BGTE: Float[Tensor, "B G T E"],
    allowed: Bool[Tensor, "B 1 T T"] | None,
    scale: float,
) -> Float[Tensor, "B G T T"]:
    """The patterns themselves, of few heads: rows sum to 1."""
    scores = (q_BGTE * scale) @ k_BGTE.transpose(-1, -2)
    if allowed is None:
        n_positions = q_BGTE.shape[2]
        allowed = torch.ones(n_positions, n_positions, dtype=torch.bool, device=q_BGTE.device).tril()
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)


def pattern_costs(pattern: Float[Tensor, "B G T T"], penalty: Any) -> Float[Tensor, "B G T"]:
    """What a penalty (``Entropy`` or ``Power``) charges for every row."""
    kept = pattern.clamp(min=torch.finfo(pattern.dtype).tiny ** 0.5)  # no gradient through keys without attention
    if penalty.kind == "entropy":
        return -(pattern * kept.log()).sum(-1)
    return kept.pow(penalty.p).sum(-1)


def attend(
    q_BGTE: Float[Tensor, "B G T E"],
    k_BGTE: Float[Tensor, "B G T E"],
    v_BGTW: Float[Tensor, "B G T W"],
    mask: Bool[Tensor, "B T"],
    *,
    scale: float,
    penalty: Any = None,
    limit_mib: float = 32.0,
) -> Attended:
    """Every head's values moved by its pattern; ``penalty`` (Entropy, Power or None) charges for pattern rows."""
    size = heads_at_a_time(len(mask), mask.shape[1], q_BGTE.element_size(), limit_mib)
    allowed, outputs, costs = allowed_keys(mask), [], []
    for q, k, v in zip(q_BGTE.split(size, 1), k_BGTE.split(size, 1), v_BGTW.split(size, 1), strict=True):
        arguments = (q, k, v, mask, allowed, scale, penalty)
        if torch.is_grad_enabled() and (penalty is not None or q.device.type != "cpu"):
            z, cost = checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            z, cost = _attend(*arguments)
        outputs.append(z)
        costs.append(cost)
    return Attended(torch.cat(outputs, 1), None if penalty is None else torch.stack(costs).sum())


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, allowed: Tensor | None, scale: float, penalty: Any
) -> tuple[Tensor, Tensor | None]:
    if penalty is None:
        # Only equal widths have a kernel without [T, T], and on a GPU multiples of 8.
        width, columns = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8, v.shape[-1]
        q, k, v = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
        z = scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale)
        return z[..., :columns], None
    pattern = patterns(q, k, allowed, scale)
    return pattern @ v, (pattern_costs(pattern, penalty) * mask[:, None]).sum()
