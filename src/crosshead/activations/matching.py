"""Positions of other contexts that hold the same current and previous token.

A control for two-layer dictionaries (design choice; methods 4, control ii): what a feature of both layers owes to the
two tokens alone survives when one layer's row comes from such a position, what it owes to the context does not.

Shape legend: n contexts, T positions, M = n * (T - 1) counted positions (position 0, the beginning-of-text token, is
none, but it is the previous token of position 1), m positions that ask for a donor.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["LEVELS", "Donors", "TokenMatches"]

LEVELS = ("pair", "token", "any")
"""What a donor shares, best first: current and previous token, the current token, nothing."""

Indices = Int[np.ndarray, " m"]


class Donors(NamedTuple):
    """One counted position of another context for every position that asked."""

    contexts: Indices
    positions: Indices
    levels: Indices
    """Index into LEVELS: the best at which there is any donor."""


class _Sorted(NamedTuple):
    """Counted positions by (key, context): those of a key lie side by side, and within them those of a context."""

    codes: Int[np.ndarray, " M"]
    """key * n + context, ascending."""
    order: Int[np.ndarray, " M"]
    """Which counted position, row by row, stands where."""


class TokenMatches:
    """An index over the tokens of a split."""

    def __init__(self, tokens: Int[Tensor, "n T"]):
        """ValueError for fewer than two contexts, or contexts without a counted position."""
        self.n_contexts, self.length = tokens.shape
        if self.n_contexts < 2 or self.length < 2:
            raise ValueError(f"got {self.n_contexts} contexts of {self.length} tokens; matching takes rows of other "
                             "contexts, give at least two contexts of two tokens")  # fmt: skip
        self._tokens = tokens.cpu().numpy().astype(np.int64)
        self._vocabulary = int(self._tokens.max()) + 1
        self._owners = np.repeat(np.arange(self.n_contexts), self.length - 1)
        positions = np.tile(np.arange(1, self.length), self.n_contexts)
        self._sorted = [self._sort(keys) for keys in self._keys(self._owners, positions)]

    def draw(self, contexts: Indices, positions: Indices, generator: torch.Generator) -> Donors:
        """A donor for each of some counted positions, evenly among those of the best level that has any.

        A donor may be drawn more than once. One random number a position, whatever there is to choose from.
        """
        chance = torch.rand(len(contexts), generator=generator, dtype=torch.float64).numpy()
        level = np.full(len(contexts), len(LEVELS))
        place = np.zeros(len(contexts), dtype=np.int64)
        for number, keys in enumerate(self._keys(contexts, positions)):
            start, own, after, end = self._bounds(number, keys, contexts)
            n_others = (end - start) - (after - own)
            # A chance next to 1 may round up to the number itself.
            picked = start + np.minimum((chance * n_others).astype(np.int64), n_others - 1)
            picked += np.where(picked >= own, after - own, 0)
            new = (level == len(LEVELS)) & (n_others > 0)
            level[new], place[new] = number, self._sorted[number].order[picked[new]]
        return Donors(self._owners[place], place % (self.length - 1) + 1, level)

    def shares(self) -> dict[str, float]:
        """Share of the split's counted positions whose best level is each of LEVELS; they sum to 1."""
        positions = np.tile(np.arange(1, self.length), self.n_contexts)
        found = []
        for number, keys in enumerate(self._keys(self._owners, positions)):
            start, own, after, end = self._bounds(number, keys, self._owners)
            found.append((end - start) > (after - own))
        pair, token = found[0], found[1]
        return dict(zip(LEVELS, (float(pair.mean()), float((token & ~pair).mean()), float((~token).mean())),
                        strict=True))  # fmt: skip

    def _keys(self, contexts: Indices, positions: Indices) -> list[Indices]:
        """What positions of a group have in common, per level."""
        current, previous = self._tokens[contexts, positions], self._tokens[contexts, positions - 1]
        return [previous * self._vocabulary + current, current, np.zeros_like(current)]

    def _sort(self, keys: Int[np.ndarray, " M"]) -> _Sorted:
        codes = keys * self.n_contexts + self._owners
        order = np.argsort(codes, kind="stable")
        return _Sorted(codes[order], order)

    def _bounds(self, level: int, keys: Indices, contexts: Indices) -> tuple[Indices, Indices, Indices, Indices]:
        """Where a key's positions begin, where its own context's begin and end among them, and where all end."""
        first = keys * self.n_contexts
        codes = self._sorted[level].codes
        starts = np.searchsorted(codes, first), np.searchsorted(codes, first + contexts)
        ends = np.searchsorted(codes, first + contexts, "right"), np.searchsorted(codes, first + self.n_contexts)
        return starts[0], starts[1], ends[0], ends[1]
