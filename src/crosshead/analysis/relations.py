"""How a key stands to a query: the kinds of pairs (t, s) that moved mass is sorted by.

Shape legend: T positions (t query, s key), C relations (RELATIONS).

Only allowed pairs count: s <= t, both counted (never padding, never the beginning-of-text token).

- induction: s comes right after an earlier occurrence of the token at t (the survey's definition);
- previous_token: s = t - 1; duplicate_token: an earlier occurrence itself; same_position: s = t;
- delimiter: the key is a token without letter or digit (punctuation, newline, spaces);
- other: none of the four positional ones.

Base rate: the same mass at t, its key drawn anew, uniformly from the keys that t may look at. ``expected`` is the mean
of that draw in closed form, ``null`` are draws (design choice). A draw at equal distance would be stricter and says
nothing here: on repeated tokens, as for the previous token, distance decides the relation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosshead.activations.survey import position_kinds

__all__ = ["POSITIONAL", "RELATIONS", "PairWeights", "delimiters", "pair_weights"]

POSITIONAL = ("induction", "previous_token", "duplicate_token", "same_position")
RELATIONS = (*POSITIONAL, "delimiter", "other")


class PairWeights(NamedTuple):
    """Weights of the pairs of one context: multiplied with masses and summed, they give the sums that shares need."""

    within: Float[Tensor, "T T C"]
    """1 where the pair (t, s) is of the relation."""
    possible: Float[Tensor, "T C"]
    """1 where t may look at some key of the relation: mass at other queries cannot be of it."""
    expected: Float[Tensor, "T C"]
    """Share of the keys that t may look at which are of the relation."""
    null: Float[Tensor, "draws T T C"]
    """``within`` of a key drawn anew for every pair."""

    def columns(self) -> Float[Tensor, "T T K"]:
        """All of them side by side, by t and s: within, possible, expected, then every draw."""
        shape = self.within.shape
        per_query = [part[:, None].expand(shape) for part in (self.possible, self.expected)]
        return torch.cat([self.within, *per_query, *self.null], dim=-1)


def delimiters(tokens: Int[Tensor, "B T"], tokenizer: Any) -> Bool[Tensor, "B T"]:
    """Which tokens hold no letter and no digit."""
    found, inverse = torch.unique(tokens.cpu(), return_inverse=True)
    plain = [not any(map(str.isalnum, tokenizer.decode([token]))) for token in found.tolist()]
    return torch.tensor(plain, dtype=torch.bool)[inverse].to(tokens.device)


def pair_weights(
    tokens: Int[Tensor, " T"],
    mask: Bool[Tensor, " T"],
    delimiter: Bool[Tensor, " T"],
    draws: int,
    generator: torch.Generator,
) -> PairWeights:
    """The weights of one context; ``draws`` keys are drawn for every pair from ``generator``. On the CPU."""
    tokens, mask, delimiter = tokens.cpu(), mask.cpu(), delimiter.cpu()
    kinds = {name: kind[0] for name, kind in position_kinds(tokens[None]).items()}
    n_positions = len(tokens)
    allowed = torch.ones(n_positions, n_positions, dtype=torch.bool).tril() & mask[:, None] & mask[None, :]
    kinds |= {
        "same_position": torch.eye(n_positions, dtype=torch.bool),
        "delimiter": delimiter[None, :].expand_as(allowed),
    }
    positional = torch.stack([kinds[name] for name in POSITIONAL]).any(0)
    kinds["other"] = ~positional
    within = torch.stack([kinds[name] & allowed for name in RELATIONS], dim=-1)
    n_allowed = allowed.sum(1).clamp(min=1)
    expected = within.sum(1) / n_allowed[:, None]
    return PairWeights(
        within.float(), within.any(1).float(), expected, _drawn(within, mask, n_allowed, draws, generator).float()
    )


def _drawn(
    within: Bool[Tensor, "T T C"],
    mask: Bool[Tensor, " T"],
    n_allowed: Int[Tensor, " T"],
    draws: int,
    generator: torch.Generator,
) -> Bool[Tensor, "draws T T C"]:
    counted = mask.nonzero()[:, 0]
    n_positions = len(mask)
    if not len(counted):
        return within.expand(draws, *within.shape)
    uniform = torch.rand(draws, n_positions, n_positions, generator=generator)
    # Counted positions ascend, so the first n_allowed(t) of them are the keys of a counted t.
    keys = counted[(uniform * n_allowed[None, :, None]).long().clamp(max=len(counted) - 1)]
    return within[torch.arange(n_positions)[None, :, None], keys]


def column_slices(draws: int) -> Sequence[slice]:
    """Where ``columns`` has within, possible, expected and every draw."""
    width = len(RELATIONS)
    return [slice(i * width, (i + 1) * width) for i in range(3 + draws)]
