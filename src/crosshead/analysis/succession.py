"""Succession: lists in their order (Monday, Tuesday, ...) against the same items shuffled.

Shape legend: B texts, T positions, F features, P pairs of texts.

A succession feature moves more, or fires more strongly, on ordered items than on the same items in disorder. Every
ordered window has one shuffled twin in which no item follows its predecessor; queries count from the second item on,
because the first has nothing to succeed. After Gould et al., Successor Heads (2023); the score is a design choice.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from crosshead.dictionaries.base import Batch

__all__ = ["FAMILIES", "SuccessionTexts", "queries_after_first_item", "succession_texts"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "days": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "months": ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
               "November", "December"),
    "numbers": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    "digits": tuple(str(i) for i in range(1, 21)),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "ordinals": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"),
}  # fmt: skip
_CYCLIC = {"days", "months"}
_SEPARATORS = (", ", " ")


class SuccessionTexts(NamedTuple):
    """Ordered texts and, at the same places of the second list, their shuffled twins."""

    ordered: list[str]
    shuffled: list[str]
    families: list[str]
    first_items: list[str]
    """The first item of every text: ordered ones, then shuffled ones."""

    @property
    def texts(self) -> list[str]:
        """Ordered texts, then shuffled ones."""
        return [*self.ordered, *self.shuffled]


def succession_texts(windows: int, items: int, seed: int) -> SuccessionTexts:
    """``windows`` pairs of every family, ``items`` long; the same window comes with every separator."""
    generator = np.random.default_rng(seed)
    ordered, shuffled, families, first = [], [], [], ([], [])
    for family, names in FAMILIES.items():
        starts = generator.permutation(len(names) if family in _CYCLIC else len(names) - items + 1)
        for window in range(windows):
            start = int(starts[window // len(_SEPARATORS) % len(starts)])
            chosen = [names[(start + i) % len(names)] for i in range(items)]
            separator = _SEPARATORS[window % len(_SEPARATORS)]
            order = _disorder(items, generator)
            ordered.append(separator.join(chosen))
            shuffled.append(separator.join(chosen[i] for i in order))
            families.append(family)
            first[0].append(chosen[0])
            first[1].append(chosen[order[0]])
    return SuccessionTexts(ordered, shuffled, families, [*first[0], *first[1]])


def _disorder(items: int, generator: np.random.Generator) -> list[int]:
    while True:
        order = generator.permutation(items).tolist()
        if all(b != a + 1 for a, b in pairwise(order)):
            return order


def queries_after_first_item(batch: Batch, first_items: Sequence[str], tokenizer: Any) -> Bool[Tensor, "B T"]:
    """Counted positions from the second item on."""
    n_first = [len(tokenizer(item, add_special_tokens=False)["input_ids"]) for item in first_items]
    position = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    return batch.mask & (position > torch.tensor(n_first, device=batch.mask.device)[:, None])
