"""Two dictionaries' features side by side: the same feature, or nearly, learned under two constraints.

Shape legend: F, G features of the two, A anchors (positions of all contexts).

The similarity of two features is the cosine of their activations over all anchors. A pair is matched when each is the
other's most similar feature and the cosine is at least a threshold. What differs within matched pairs is not a matter
of which features a dictionary has spent its budget on, as a difference between medians over all features is.

Two numbers are compared: the breadth of attention (``moved.Moved.breadth``), and the effective number of tokens at
which they fire (``moved.Moved.effective_tokens``), a proxy of polysemanticity. Design choices.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from crosshead.analysis.examples import largest_moves
from crosshead.analysis.moved import Moved
from crosshead.analysis.predictability import median_interval

__all__ = ["match_features", "matched_pairs"]

Record = dict[str, Any]
Array = NDArray[Any]


def matched_pairs(first: Moved, second: Moved, threshold: float) -> tuple[Array, Array, Array]:
    """Features of both that move anything, and their cosines, best first.

    ValueError for dictionaries that are read at different ends of a move or were looked at on different texts.
    """
    if first.mover.anchored != second.mover.anchored:
        raise ValueError(f"features read at the {first.mover.anchored} and at the {second.mover.anchored} of a move "
                         "cannot be matched by where they fire; name two dictionaries of one kind")  # fmt: skip
    if first.tokens.shape != second.tokens.shape or bool((first.tokens != second.tokens).any()):
        raise ValueError("the two dictionaries were looked at on different texts; use the same contexts")
    similar = (_directions(first).T @ _directions(second)).tocsr()
    best, back = (np.asarray(similar.argmax(axis=axis)).ravel() for axis in (1, 0))
    cosine = similar.max(axis=1).toarray().ravel()
    moves, other_moves = (found.mass.numpy() > 0 for found in (first, second))
    own = np.flatnonzero((back[best] == np.arange(len(best))) & (cosine >= threshold) & moves & other_moves[best])
    own = own[np.argsort(-cosine[own], kind="stable")]
    return own, best[own], cosine[own]


def _directions(found: Moved) -> Any:
    """[A, F], every feature's activations as a vector of length 1; zero where it never fires."""
    entries, n_positions = found.entries, found.tokens.shape[1]
    rows = (entries.context * n_positions + entries.anchor).numpy()
    columns, values = entries.feature.numpy(), entries.value.double().numpy()
    n_features = len(found.mass)
    size = np.sqrt(np.bincount(columns, values**2, n_features))
    scaled = np.divide(values, size[columns], out=np.zeros_like(values), where=size[columns] > 0)
    return csr_array((scaled, (rows, columns)), shape=(found.tokens.numel(), n_features))


def match_features(
    names: tuple[str, str], first: Moved, second: Moved, tokenizer: Any, *,
    threshold: float, n_shown: int, bootstraps: int, seed: int,
) -> Record:  # fmt: skip
    """What meaning.json holds of two dictionaries: how many features match, what differs, and some pairs for reading.

    ``{first, second, n_live, n_matched, cosine, measures, pairs}``; of a measure, ``ratio`` is the median over pairs of
    second over first, with its bootstrap interval. Pairs for reading are spread evenly over the matched ones, from the
    most similar to the least.
    """
    own, other, cosine = matched_pairs(first, second, threshold)
    measured = {
        "breadth": (first.breadth()[own], second.breadth()[other]),
        "tokens": (first.effective_tokens()[own], second.effective_tokens()[other]),
    }
    chosen = np.unique(np.linspace(0, len(own) - 1, min(n_shown, len(own))).round().astype(int)).tolist()
    return {
        "first": names[0],
        "second": names[1],
        "n_live": [int((found.mass > 0).sum()) for found in (first, second)],
        "n_matched": len(own),
        "cosine": float(np.median(cosine)) if len(own) else None,
        "measures": {name: _compared(*values, bootstraps, seed) for name, values in measured.items()},
        "pairs": [
            {
                "features": [int(own[i]), int(other[i])],
                "cosine": float(cosine[i]),
                **{name: [float(side[i]) for side in values] for name, values in measured.items()},
                "texts": [(largest_moves(found, int(i_own), tokenizer, 1) or [""])[0]
                          for found, i_own in ((first, own[i]), (second, other[i]))],
            }
            for i in chosen
        ],
    }  # fmt: skip


def _compared(first: Array, second: Array, bootstraps: int, seed: int) -> Record | None:
    known = np.isfinite(first) & np.isfinite(second)
    if not known.any():
        return None
    ratios = second[known] / first[known]
    return {"first": float(np.median(first[known])), "second": float(np.median(second[known])),
            "ratio": float(np.median(ratios)), "interval": median_interval(ratios, bootstraps, seed)}  # fmt: skip
