"""Attention heads of known kinds, as queries and keys in one-hot subspaces.

Shape legend: n contexts, T positions, V tokens of the vocabulary, W = V + T + 1 width of a code: token subspace,
position subspace, one constant coordinate.

Scores are q.k without a scale. A place that a head looks for scores ``sharpness``, others 0, the beginning-of-text
token ``sink``: where there is nothing to look at, attention rests there, as it does in language models (design choice).

    previous_token    s = t - 1
    induction         s after an earlier occurrence of t's token
    duplicate_token   s < t with t's token
    delimiter         s <= t that is a delimiter
    skip_trigram      s <= t whose token is one of those that t's token looks for
    local             s = t - 5 ... t - 2
    uniform           every s
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from crosshead.maths.patterns import AttentionSpec, attention_patterns

__all__ = ["HeadKind", "PlantedHeads", "code_width", "draw_pairs", "draw_tokens", "head_codes", "looked_for"]

HeadKind = Literal["previous_token", "induction", "duplicate_token", "delimiter", "skip_trigram", "local", "uniform"]
_LOCAL = (2, 3, 4, 5)
_KEYS_PER_QUERY = 2
_GRAM_CONTEXTS = 128


class PlantedHeads(NamedTuple):
    """The heads of a layer over all contexts."""

    kinds: tuple[HeadKind, ...]
    tokens: Int[Tensor, "n T"]
    pairs: Bool[Tensor, "V V"]
    delimiters: int
    q: Float[Tensor, "n H T E"]
    k: Float[Tensor, "n H T E"]
    patterns: Float[Tensor, "n H T T"]
    spec: AttentionSpec

    @classmethod
    def of(
        cls, kinds: Sequence[HeadKind], tokens: Int[Tensor, "n T"], pairs: Bool[Tensor, "V V"], *, delimiters: int,
        sharpness: float, sink: float, width: int,
    ) -> "PlantedHeads":  # fmt: skip
        """Heads of the given kinds; ``width`` is E, at least the width of a code."""
        spec = AttentionSpec(n_heads=len(kinds), n_kv_heads=len(kinds), head_dim=width, scale=1.0)
        q, k = (torch.zeros(len(tokens), len(kinds), tokens.shape[1], width) for _ in range(2))
        for h, kind in enumerate(kinds):
            codes = head_codes(kind, tokens, pairs, delimiters, sharpness, sink)
            for whole, code in zip((q, k), codes, strict=True):
                whole[:, h, :, : code.shape[-1]] = code
        return cls(tuple(kinds), tokens, pairs, delimiters, q, k, attention_patterns(q, k, spec), spec)

    def gram(self) -> Float[Tensor, "M M"]:
        """Mean over counted positions of sum_s A_m(t,s) A_m'(t,s), identity first, beginning-of-text key left out."""
        movers = self._movers()
        n_positions = len(self.patterns[:_GRAM_CONTEXTS]) * (self.patterns.shape[-1] - 1)
        return (movers @ movers.T / n_positions).float()

    def semantic(self) -> dict[str, Any]:
        """Every kind's semantic pattern by least squares in the movers: ``weights``, and what is left, ``residual``."""
        movers = self._movers()
        gram = movers @ movers.T
        gram.diagonal().add_(1e-9 * gram.diagonal().mean())
        found = {}
        for kind in dict.fromkeys(self.kinds):
            wanted = looked_for(kind, self.tokens[:_GRAM_CONTEXTS], self.pairs, self.delimiters)
            wanted = wanted[:, 1:, 1:].flatten().double()
            weights = torch.linalg.solve(gram, movers @ wanted)
            rest = (wanted - weights @ movers).square().sum() / wanted.square().sum().clamp(min=1e-12)
            found[kind] = {"residual": float(rest), "weights": weights.tolist()}
        return found

    def _movers(self) -> Float[Tensor, "M pairs"]:
        """Identity and head patterns between counted positions of some contexts, flattened."""
        counted = self.patterns[:_GRAM_CONTEXTS, :, 1:, 1:]
        identity = torch.eye(counted.shape[-1]).expand(len(counted), 1, -1, -1)
        return torch.cat([identity, counted], 1).transpose(0, 1).flatten(1).double()


def draw_tokens(
    n_contexts: int, length: int, vocabulary: int, repeats: int, generator: torch.Generator
) -> Int[Tensor, "n T"]:
    """Contexts of uniform random tokens behind token 0, with ``repeats`` segments copied to a later place of each.

    Segments are a quarter of the context long, so that induction and duplicate-token heads have something to see.
    """
    tokens = torch.randint(1, vocabulary, (n_contexts, length), generator=generator)
    tokens[:, 0] = 0
    size, position = length // 4, torch.arange(length)
    for _ in range(repeats):
        source = torch.randint(1, length // 2 - size + 1, (n_contexts, 1), generator=generator)
        target = torch.randint(length // 2, length - size + 1, (n_contexts, 1), generator=generator)
        inside = (position >= target) & (position < target + size)
        tokens = tokens.gather(1, torch.where(inside, position - target + source, position))
    return tokens


def draw_pairs(vocabulary: int, generator: torch.Generator) -> Bool[Tensor, "V V"]:
    """Which key tokens (columns) every query token (row) looks for: two each; never the beginning-of-text token."""
    order = torch.rand(vocabulary, vocabulary - 1, generator=generator).argsort(1)[:, :_KEYS_PER_QUERY] + 1
    return torch.zeros(vocabulary, vocabulary, dtype=torch.bool).scatter(1, order, True)


def code_width(vocabulary: int, length: int) -> int:
    """W, the coordinates that queries and keys need."""
    return vocabulary + length + 1


def head_codes(
    kind: HeadKind, tokens: Int[Tensor, "n T"], pairs: Bool[Tensor, "V V"], delimiters: int, sharpness: float,
    sink: float,
) -> tuple[Float[Tensor, "n T W"], Float[Tensor, "n T W"]]:  # fmt: skip
    """Queries and keys of a head. Tokens 1 to ``delimiters`` are delimiters."""
    n_contexts, length = tokens.shape
    vocabulary = len(pairs)
    token, place = one_hot(tokens, vocabulary).float(), torch.eye(length).expand(n_contexts, -1, -1)
    q, k = (torch.zeros(n_contexts, length, code_width(vocabulary, length)) for _ in range(2))
    (q_token, q_place), (k_token, k_place) = ((x[..., :vocabulary], x[..., vocabulary:-1]) for x in (q, k))
    q[..., -1] = 1.0
    if kind == "previous_token":
        q_place.copy_(sharpness * _earlier(place, 1))
        k_place.copy_(place)
    elif kind == "induction":
        q_token.copy_(sharpness * token)
        k_token.copy_(_earlier(token, 1))
    elif kind == "duplicate_token":
        q_token.copy_(sharpness * token)
        k_token.copy_(token)
        q_place.copy_(-sharpness * place)  # a token is no duplicate of itself
        k_place.copy_(place)
    elif kind == "delimiter":
        k[..., -1] = sharpness * _is_delimiter(tokens, delimiters)
    elif kind == "skip_trigram":
        q_token.copy_(sharpness * token)
        k_token.copy_(token @ pairs.T.float())
    elif kind == "local":
        q_place.copy_(sharpness * torch.stack([_earlier(place, distance) for distance in _LOCAL]).sum(0))
        k_place[:, 1:] = place[:, 1:]  # the first token would take all of what looks at it
    k[:, 0, -1] = sink
    return q, k


def looked_for(
    kind: HeadKind, tokens: Int[Tensor, "n T"], pairs: Bool[Tensor, "V V"], delimiters: int
) -> Float[Tensor, "n T T"]:
    """The semantic pattern of a kind: equal shares over what it looks for, rows without any zero, token 0 left out."""
    length = tokens.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    same = tokens[:, :, None] == tokens[:, None, :]
    match kind:
        case "previous_token":
            wanted = (distance == 1).expand_as(same)
        case "induction":
            after = torch.zeros_like(same)
            after[..., 1:] = same[..., :-1]
            wanted = after & (distance >= 0)
        case "duplicate_token":
            wanted = same & (distance > 0)
        case "delimiter":
            wanted = _is_delimiter(tokens, delimiters)[:, None, :] & (distance >= 0)
        case "skip_trigram":
            wanted = pairs[tokens[:, :, None], tokens[:, None, :]] & (distance >= 0)
        case "local":
            wanted = ((distance >= _LOCAL[0]) & (distance <= _LOCAL[-1])).expand_as(same)
        case "uniform":
            wanted = (distance >= 0).expand_as(same)
    shares = wanted.float()
    shares[:, 0], shares[..., 0] = 0.0, 0.0
    return shares / shares.sum(-1, keepdim=True).clamp(min=1.0)


def _is_delimiter(tokens: Tensor, delimiters: int) -> Bool[Tensor, "n T"]:
    return (tokens >= 1) & (tokens <= delimiters)


def _earlier(x: Float[Tensor, "n T c"], distance: int) -> Float[Tensor, "n T c"]:
    """Row t holds row t - distance; zero where there is none."""
    shifted = torch.zeros_like(x)
    shifted[:, distance:] = x[:, : x.shape[1] - distance]
    return shifted
