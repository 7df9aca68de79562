"""What every feature moves from where to where: sums over contexts, and the shares they give.

Shape legend: T positions (t query, s key), F features, C relations, M movers, Z active (feature, anchor) pairs.

The mass of a move is the size of what it writes, |P_i(t, s)| f_i(s) ||d_i|| (crosshead.analysis.movers has the other
architectures). The share of a relation is its mass over all mass at queries that have a key of the relation, so a
feature that always takes the induction key when there is one has share 1. Breadth is exp of the entropy of a query's
sources, the entropy averaged with the mass at the query: 1 means one source, n means n equal ones.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from crosshead.analysis.movers import Mover, Moves
from crosshead.analysis.relations import RELATIONS, column_slices, pair_weights
from crosshead.dictionaries.base import Batch

__all__ = ["Entries", "Moved", "moved"]

Array = NDArray[Any]


class Entries(NamedTuple):
    """Every active feature at every anchor, in the order of contexts and anchors."""

    context: Int[Tensor, " Z"]
    anchor: Int[Tensor, " Z"]
    """The source; the destination where the dictionary reads the query side."""
    feature: Int[Tensor, " Z"]
    value: Float[Tensor, " Z"]
    mass: Float[Tensor, " Z"]
    """Of all its moves."""
    other: Float[Tensor, " Z"]
    """Of its moves in none of the positional relations."""
    partner: Int[Tensor, " Z"]
    """The other end of its largest move."""


class TokenMass(NamedTuple):
    """Mass by feature and token at the anchor, P pairs in order of feature and token."""

    feature: Int[np.ndarray, " P"]
    token: Int[np.ndarray, " P"]
    mass: Float[np.ndarray, " P"]
    other: Float[np.ndarray, " P"]
    """Of moves in none of the positional relations."""


@dataclass
class Moved:
    """Sums over contexts (float64, on the CPU). Masses are at counted queries."""

    mover: Mover
    draws: int
    tokens: Int[Tensor, "n T"]
    mask: Bool[Tensor, "n T"]
    firings: Int[Tensor, " F"]
    mass: Float[Tensor, " F"]
    columns: Float[Tensor, "F K"]
    through: Float[Tensor, "F M"]
    """Mass that every mover alone would move."""
    entropy: Float[Tensor, " F"]
    """Sum over queries of mass times the entropy (nats) of its sources."""
    power: Float[Tensor, " F"]
    """Sum over queries of the squared size of what is written."""
    context_mass: Float[Tensor, "n F"]
    entries: Entries

    def share(self, relation: str) -> Array:
        """Share of mass in a relation [F]; NaN where the relation was never possible."""
        within, possible = (self._column(part, relation) for part in (0, 1))
        return _ratio(within, possible)

    def pooled_share(self, relation: str, features: Array) -> float | None:
        """Share of the mass of some features [F] together; None where the relation was never possible."""
        within, possible = (float(self._column(part, relation)[features].sum()) for part in (0, 1))
        return within / possible if possible else None

    def expected_share(self, relation: str) -> Array:
        """The same with uniformly drawn keys, in the mean [F]."""
        return _ratio(self._column(2, relation), self._column(1, relation))

    def null_shares(self, relation: str) -> Array:
        """The same with drawn keys [draws, F]."""
        return np.stack([_ratio(self._column(3 + draw, relation), self._column(1, relation))
                         for draw in range(self.draws)])  # fmt: skip

    def breadth(self) -> Array:
        """Exp of the mean entropy of sources [F]; NaN for features that move nothing."""
        return np.exp(_ratio(self.entropy.numpy(), self.mass.numpy()))

    def skip_trigram_share(self) -> Array | None:
        """Share of a feature's mass that starts at its commonest key token (by mass) in no positional relation [F].

        A skip-trigram moves from one token, wherever that stands. None for dictionaries that are read at the query.
        NaN for features that move nothing.
        """
        if self.mover.anchored != "source":
            return None
        found = self._by_token()
        # By feature, then mass; of equal ones the smaller token comes first.
        order = np.lexsort((found.token, -found.mass, found.feature))
        features, first = np.unique(found.feature[order], return_index=True)
        share = np.zeros(len(self.mass))
        share[features] = found.other[order[first]]
        return _ratio(share, self.mass.numpy())

    def effective_tokens(self) -> Float[np.ndarray, " F"]:
        """Exp of the entropy of a feature's mass over the tokens at its anchors; NaN for those that move nothing."""
        feature, _, mass, _ = self._by_token()
        whole = np.bincount(feature, mass, len(self.mass))
        share = np.divide(mass, whole[feature], out=np.zeros_like(mass), where=mass > 0)
        entropy = np.bincount(feature, -share * np.log(np.where(share > 0, share, 1.0)), len(whole))
        return np.where(whole > 0, np.exp(entropy), np.nan)

    def _by_token(self) -> TokenMass:
        entries = self.entries
        token = self.tokens[entries.context, entries.anchor].numpy()
        pairs, place = np.unique(np.stack([entries.feature.numpy(), token]), axis=1, return_inverse=True)
        mass, other = (np.bincount(place.ravel(), part.double().numpy(), pairs.shape[1])
                       for part in (entries.mass, entries.other))  # fmt: skip
        return TokenMass(pairs[0], pairs[1], mass, other)

    def _column(self, part: int, relation: str) -> Array:
        return self.columns[:, column_slices(self.draws)[part]][:, RELATIONS.index(relation)].numpy()


def _ratio(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


@dataclass
class _Parts:
    """What is collected context by context."""

    sums: dict[str, Tensor]
    contexts: list[Tensor] = field(default_factory=list)
    entries: list[Entries] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    masks: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def moved(
    mover: Mover,
    batches: Iterable[Batch],
    *,
    delimiter: Callable[[Int[Tensor, "B T"]], Bool[Tensor, "B T"]],
    destinations: Sequence[Bool[Tensor, "B T"]] | None = None,
    draws: int = 2,
    seed: int = 0,
) -> Moved:
    """Sum over batches of equal context length. ``destinations``, one per batch, leaves out other queries.

    Draws of the null depend on the seed and the number of the context.
    """
    n_features, n_movers = mover.n_features, len(mover.movers)
    width = len(RELATIONS) * (3 + draws)
    shapes = {"mass": (), "columns": (width,), "through": (n_movers,), "entropy": (), "power": ()}
    parts = _Parts({name: torch.zeros(n_features, *shape, dtype=torch.float64) for name, shape in shapes.items()})
    for number, batch in enumerate(batches):
        counted = batch.mask if destinations is None else destinations[number].to(batch.mask.device) & batch.mask
        plain = delimiter(batch.tokens)
        for c, rows in enumerate(mover.contexts(batch)):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(parts.tokens))
            weights = pair_weights(batch.tokens[c], batch.mask[c], plain[c], draws, generator).columns()
            weights = weights if mover.anchored == "destination" else weights.transpose(0, 1).contiguous()
            _Context(mover, counted[c], weights.to(batch.mask.device)).add(rows, parts)
            parts.tokens.append(batch.tokens[c].cpu())
            parts.masks.append(batch.mask[c].cpu())
    entries = _joined(parts.entries) if parts.entries else _NONE
    return Moved(mover, draws, torch.stack(parts.tokens), torch.stack(parts.masks),
                 torch.bincount(entries.feature, minlength=n_features), context_mass=torch.stack(parts.contexts),
                 entries=entries, **parts.sums)  # fmt: skip


_NO_NUMBERS, _NO_VALUES = torch.zeros(0, dtype=torch.long), torch.zeros(0)
_NONE = Entries(_NO_NUMBERS, _NO_NUMBERS, _NO_NUMBERS, _NO_VALUES, _NO_VALUES, _NO_VALUES, _NO_NUMBERS)


def _joined(parts: Sequence[Entries]) -> Entries:
    return Entries(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


class _Context:
    """The sums of one context."""

    def __init__(self, mover: Mover, counted: Bool[Tensor, " T"], weights: Float[Tensor, "T T K"]):
        self.by_source = mover.anchored == "source"
        self.counted, self.weights = counted.float(), weights
        n_features, device = mover.n_features, counted.device
        self.sums = torch.zeros(n_features, weights.shape[-1], device=device)
        self.through = torch.zeros(n_features, len(mover.movers), device=device)
        self.mass, self.entropy, self.power = (torch.zeros(n_features, device=device) for _ in range(3))
        # Sources of one query come one after another: what needs all of them is kept by query.
        shape = (n_features, len(counted)) if self.by_source else (0, 0)
        self.by_query, self.log_sum, self.signed = (torch.zeros(shape, device=device) for _ in range(3))
        self.entries: list[Entries] = []

    def add(self, rows: Iterable[Moves], parts: _Parts) -> None:
        """Read all rows and add what they give to ``parts``."""
        for row in rows:
            self._add_row(row, len(parts.contexts))
        if self.by_source:
            self.mass = self.by_query.sum(1)
            self.entropy = (torch.special.xlogy(self.by_query, self.by_query) - self.log_sum).sum(1)
            self.power = self.signed.square().sum(1)
        sums = (self.mass, self.sums, self.through, self.entropy, self.power)
        for total, own in zip(parts.sums.values(), sums, strict=True):
            total += own.double().cpu()
        parts.contexts.append(self.mass.double().cpu())
        if self.entries:
            parts.entries.append(_joined(self.entries))

    def _add_row(self, row: Moves, context: int) -> None:
        features, others = row.features, row.others
        if self.by_source:
            counted = self.counted[others]
        else:
            counted = self.counted[row.anchor].expand(others.stop - others.start)
        written = row.written * counted
        mass = written.abs()
        columns = mass @ self.weights[row.anchor, others]
        # A feature stands once in a row, so plain indexing adds (and is ten times faster than index_add_).
        self.sums[features] += columns
        self.through[features] += row.through(counted)
        total = mass.sum(1)
        if self.by_source:
            self.by_query[features, others] += mass
            self.log_sum[features, others] += torch.special.xlogy(mass, mass)
            self.signed[features, others] += written
        else:
            own_entropy = torch.special.xlogy(total, total) - torch.special.xlogy(mass, mass).sum(1)
            self.mass[features] += total
            self.entropy[features] += own_entropy
            self.power[features] += written.sum(1).square()
        place = torch.full_like(features, row.anchor)
        partner = mass.argmax(1) + others.start
        other = columns[:, RELATIONS.index("other")]
        self.entries.append(Entries(torch.full_like(features, context), place, features, row.values, total, other,
                                    partner))  # fmt: skip
