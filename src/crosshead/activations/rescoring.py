"""Change attention scores inside a running model, and let its own softmax, values and later layers do the rest.

Shape legend: B contexts, H query heads, K key/value heads, T positions, E head width.

A score is a product of a query and a key, so any change of scores is one of products: queries get coordinates that say
which query they are, keys get what that query's score is to change by. The model's own attention function then applies
scale, soft-cap, mask, sinks and softmax to changed scores as to any others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosshead.activations.anatomy import anatomy
from crosshead.activations.base_model import LanguageModel
from crosshead.activations.interface import AttentionResult, observed_attention
from crosshead.activations.taps import check_site, check_tokens
from crosshead.dictionaries.base import Site
from crosshead.maths.patterns import attention_patterns, expand_kv

__all__ = ["rescored", "run_rescored"]

Change = Callable[[Float[Tensor, "B H T T"]], Float[Tensor, "B H T T"]]
"""From scores (after the scale, before the soft-cap) to other scores."""


@contextmanager
def rescored(
    model: LanguageModel, layer: int, change: Change, seen: Callable[[Float[Tensor, "B H T T"]], None] | None = None
) -> Iterator[None]:
    """While active, one layer attends by ``change(scores)``; ``seen`` gets the pattern that comes of it.

    ValueError for a layer out of range.
    """
    check_site(model, Site(layer, "q"))
    body = anatomy(model)
    part = body.layers[layer]
    spec = part.spec

    def observe(
        module: nn.Module,
        q_BHTE: Tensor,
        k_BKTE: Tensor,
        v_BKTE: Tensor,
        keywords: dict[str, Any],
        proceed: Callable[[Tensor, Tensor, Tensor], AttentionResult],
    ) -> AttentionResult:
        if module is not part.attention:
            return proceed(q_BHTE, k_BKTE, v_BKTE)
        scores = q_BHTE @ expand_kv(k_BKTE, spec.n_heads).transpose(-1, -2) * spec.scale
        q, k = _with_offsets(q_BHTE, k_BKTE, (change(scores) - scores) / spec.scale)
        if seen is not None:
            wide = spec.model_copy(update={"head_dim": q.shape[-1]})
            seen(attention_patterns(q.float(), k.float(), wide))
        return proceed(q, k, v_BKTE)

    with observed_attention(model.model, body.implementation, observe):
        yield


def _with_offsets(
    q_BHTE: Tensor, k_BKTE: Tensor, offsets: Float[Tensor, "B H T T"]
) -> tuple[Float[Tensor, "B H T W"], Float[Tensor, "B K T W"]]:
    """Queries and keys, wider by T for every head of a group, whose products are those of q and k plus ``offsets``."""
    n_contexts, n_heads, length, _ = q_BHTE.shape
    n_groups = k_BKTE.shape[1]
    shared = n_heads // n_groups
    causal = torch.ones(length, length, dtype=torch.bool, device=q_BHTE.device).tril()
    offsets = offsets.masked_fill(~causal, 0.0)
    which = torch.eye(shared, device=q_BHTE.device)[torch.arange(n_heads, device=q_BHTE.device) % shared]
    place = torch.eye(length, device=q_BHTE.device)
    says = torch.einsum("hj,tu->htju", which, place).flatten(2).to(q_BHTE)
    by_key = offsets.unflatten(1, (n_groups, shared)).flatten(2, 3).transpose(-1, -2).to(k_BKTE)
    return torch.cat([q_BHTE, says.expand(n_contexts, -1, -1, -1)], -1), torch.cat([k_BKTE, by_key], -1)


@torch.no_grad()
def run_rescored(
    model: LanguageModel, tokens: Int[Tensor, "B T"], layer: int, change: Change
) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B H T T"]]:
    """Logits of the model when one layer attends by changed scores, and that layer's pattern."""
    check_tokens(model, tokens)
    patterns: list[Tensor] = []
    with model.running, rescored(model, layer, change, patterns.append):
        logits = model.model(tokens.to(model.device), use_cache=False).logits
    return logits, patterns[0]
