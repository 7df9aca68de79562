"""Examples for reading: where the clearest features of a label move most, with both ends marked.

«key» marks the token that is moved from (or the one where a feature fires), ⟦query⟧ the one that is moved to.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from crosshead.analysis.labels import FeatureLabels
from crosshead.analysis.moved import Moved

__all__ = ["clearest", "examples", "largest_moves", "snippet"]

_BEFORE, _AFTER, _BETWEEN = 8, 4, 8


def snippet(tokens: Int[Tensor, " T"], source: int, destination: int | None, tokenizer: Any) -> str:
    """The text around a move; the first token of a context, which begins every text, is left out."""
    row = tokens.tolist()

    def text(first: int, last: int) -> str:
        return _plain(tokenizer.decode(row[max(1, first) : max(1, last)]))

    start = text(source - _BEFORE, source) + f"«{text(source, source + 1)}»"
    if destination is None or destination == source:
        return start + text(source + 1, source + 1 + _AFTER)
    between = text(source + 1, destination)
    if destination - source - 1 > 2 * _BETWEEN:
        between = f"{text(source + 1, source + 1 + _BETWEEN)} … {text(destination - _BETWEEN, destination)}"
    end = destination + 1
    return f"{start}{between}⟦{text(destination, end)}⟧{text(end, end + _AFTER)}"


def _plain(text: str) -> str:
    """Without what is no character of its own: halves of pairs become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clearest(labels: FeatureLabels, name: str, n_features: int) -> list[int]:
    """The features with a label whose share is highest above chance; equal ones by number."""
    own = np.flatnonzero(labels.of(name))
    score = labels.score[own, labels.names.index(name)]
    return own[np.argsort(-score, kind="stable")][:n_features].tolist()


def examples(
    found: Moved, labels: FeatureLabels, name: str, tokenizer: Any, *, n_features: int, n_texts: int
) -> list[dict[str, Any]]:
    """A record ``{feature, label, share, expected, texts}`` for each of the clearest features of a label."""
    evidence = labels.evidence[name]
    return [
        {"feature": i, "label": name, "share": float(evidence.share[i]), "expected": float(evidence.expected[i]),
         "texts": largest_moves(found, i, tokenizer, n_texts)}
        for i in clearest(labels, name, n_features)
    ]  # fmt: skip


def largest_moves(found: Moved, feature: int, tokenizer: Any, n_texts: int) -> list[str]:
    """Snippets of a feature's largest moves, one per context."""
    entries = found.entries
    own = torch.nonzero(entries.feature == feature)[:, 0]
    own = own[torch.argsort(entries.mass[own], descending=True, stable=True)]
    texts: dict[str, None] = {}
    contexts: set[int] = set()
    for i in own.tolist():
        context, anchor, partner = (int(column[i]) for column in (entries.context, entries.anchor, entries.partner))
        if len(texts) < n_texts and context not in contexts:
            ends = (anchor, partner) if found.mover.anchored == "source" else (partner, anchor)
            end = int(found.mask[context].nonzero()[-1]) + 1
            texts[snippet(found.tokens[context, :end], *ends, tokenizer)] = None
            contexts.add(context)
    return list(texts)
