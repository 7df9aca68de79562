"""How well token n-grams predict where a feature fires: a number for "interpretable", by held-out prediction.

Shape legend: N positions of the fitting contexts, N' of the scoring ones, n features, V different tokens.

p(fires | bigram) by counts, backing off from bigram (previous token, token) to token to base rate, each level smoothed
towards the next with a weight of ``smoothing`` observations. It is fitted on training contexts and scored on held-out
ones: average precision (1: ranked perfectly; the base rate: not at all) and the share of the bits of firing that it
explains, 1 - cross-entropy / cross-entropy of the base rate (1: all; 0 or below: none). Control: the same features
with their firings shuffled over positions. ``top`` and ``middle`` rank the quarter of a feature's firings that is
largest, or around its median, against positions where it is silent: a feature that means one thing is as predictable
in the middle of its range as at its top. Design choice; after Bricken et al. (2023) on looking below the top examples.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy import sparse

from crosshead.dictionaries.base import Batch, Site

__all__ = ["Firings", "PredictabilityConfig", "Side", "average_precision", "median_interval", "ngram_probabilities",
           "observe", "predictability"]  # fmt: skip

Floats = NDArray[np.float64]
Side = Literal["from", "to"]
_WRITES = 0.01
"""A feature is moved to t when |g_i(t)| ||d_i|| is above this share of the target's size at t, as in L0 of the query
side."""


class PredictabilityConfig(BaseModel):
    """Sample and fit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Annotated[int, Field(gt=0)] = 200
    """Live features sampled per dictionary."""
    fit_contexts: Annotated[int, Field(gt=0)] = 96
    """Training contexts that n-grams are counted on."""
    minimum_firings: Annotated[int, Field(gt=1)] = 10
    """Firings a feature needs in the scoring contexts."""
    smoothing: Annotated[float, Field(gt=0)] = 8.0
    """Observations that the coarser n-gram is worth; 4 to 16 predict about equally well on 24,000 positions."""
    bootstraps: Annotated[int, Field(gt=0)] = 200
    """Resamples of the features behind an interval."""


class Firings(NamedTuple):
    """Activity of some features at counted positions."""

    tokens: NDArray[np.int64]
    """[N]."""
    previous: NDArray[np.int64]
    """[N], the token before."""
    activity: Floats
    """[N, n], 0 where a feature is silent."""

    def shuffled(self, seed: int) -> "Firings":
        """Firings at random positions, the same for all features."""
        return self._replace(activity=np.random.default_rng(seed).permutation(self.activity))


@torch.no_grad()
def observe(module: Any, batches: Iterable[Batch], features: Sequence[int]) -> dict[Side, Firings]:
    """Where features are moved from and to.

    ``from``: f_i at the source. ``to``: |g_i(t)| ||d_i|| over the size of the target, where above 1%; f_i itself for
    dictionaries that read the query side. Dictionaries whose features have no pattern of their own have no ``to``.
    """
    chosen = list(features)
    moves = hasattr(module, "effective_loadings")
    own_side: Side = "to" if hasattr(module.config, "per_head") else "from"
    sides: tuple[Side, ...] = (own_side, "to") if moves else (own_side,)
    found: dict[Side, list[torch.Tensor]] = {side: [] for side in sides}
    tokens, previous = [], []
    for batch in batches:
        before = torch.cat([batch.tokens[:, :1], batch.tokens[:, :-1]], dim=1)
        tokens.append(batch.tokens[batch.mask].cpu().numpy())
        previous.append(before[batch.mask].cpu().numpy())
        dense = _dense(module, batch, chosen)
        found[own_side].append(dense[batch.mask])
        if moves:
            found["to"].append(_written(module, batch, dense, chosen)[batch.mask])
    texts = np.concatenate(tokens), np.concatenate(previous)
    return {side: Firings(*texts, torch.cat(parts).double().cpu().numpy()) for side, parts in found.items()}


def _dense(module: Any, batch: Batch, features: list[int]) -> torch.Tensor:
    codes = module.encode(batch)
    place = torch.full((codes.n_features,), -1, device=codes.columns.device)
    place[features] = torch.arange(len(features), device=place.device)
    own = place[codes.columns] >= 0
    dense = codes.values.new_zeros(codes.n_rows, len(features))
    dense[codes.rows[own], place[codes.columns[own]]] = codes.values.detach()[own]
    return dense.view(*batch.mask.shape, -1)


def _written(module: Any, batch: Batch, dense: torch.Tensor, features: list[int]) -> torch.Tensor:
    """|g_i(t)| ||d_i|| over the size of the target; 0 where that is no more than 1%."""
    loadings, size = module.effective_loadings()[:, features], module.decoder[features].norm(dim=1)
    pattern = batch[Site(module.layer, "pattern")].to(dense)
    sums = dense * loadings[0]
    for h in range(pattern.shape[1]):
        sums += (pattern[:, h] @ dense) * loadings[h + 1]
    share = sums.abs() * size / module.target(batch).norm(dim=-1).clamp(min=1e-12)[..., None]
    return share * (share > _WRITES)


def ngram_probabilities(fit: Firings, held: Firings, smoothing: float) -> tuple[Floats, Floats]:
    """p(fires | previous token, token) at the held-out positions [N', n], and the base rates [n]."""
    fired = (fit.activity != 0).astype(float)
    base = (fired.sum(0) + 0.5) / (len(fired) + 1.0)
    by_token = _counts(fit.tokens, held.tokens, fired)
    by_bigram = _counts(_pairs(fit), _pairs(held), fired)
    probability: Floats = np.broadcast_to(base, (len(held.tokens), len(base)))
    for hits, seen in (by_token, by_bigram):
        probability = (hits + smoothing * probability) / (seen + smoothing)[:, None]
    return probability, base


def _pairs(firings: Firings) -> NDArray[np.int64]:
    return firings.previous * np.int64(2**31) + firings.tokens


def _counts(fit: NDArray[np.int64], held: NDArray[np.int64], fired: Floats) -> tuple[Floats, Floats]:
    """For every held-out position: firings [N', n] and occurrences [N'] of its n-gram in the fitting contexts."""
    known, inverse = np.unique(fit, return_inverse=True)
    one_hot = sparse.csr_array((np.ones(len(fit)), (inverse, np.arange(len(fit)))), shape=(len(known), len(fit)))
    place = np.searchsorted(known, held).clip(max=len(known) - 1)
    found = known[place] == held
    return (one_hot @ fired)[place] * found[:, None], np.bincount(inverse)[place] * found


def average_precision(scores: Floats, positive: Floats, negative: Floats) -> float:
    """Average precision of a ranking; ``positive`` and ``negative`` weigh the entries, equal scores rank together.

    NaN without positives.
    """
    _, group = np.unique(-scores, return_inverse=True)
    hits, all_ = np.bincount(group, positive), np.bincount(group, positive + negative)
    total = hits.sum()
    if not total:
        return float("nan")
    return float((np.cumsum(hits) / np.cumsum(all_).clip(min=1e-300) * hits).sum() / total)


def predictability(fit: Firings, held: Firings, config: PredictabilityConfig, seed: int) -> Mapping[str, Any] | None:
    """Medians over the features that fire often enough in ``held``; None where there is none.

    ``{median, interval, shuffled, base_rate, n_features, bits, top, middle}``: median average precision, its 95%
    bootstrap interval over features, the median of the shuffled features, the median share of positions where a feature
    fires; ``bits`` has median, interval and shuffled of the share of bits explained; ``top`` and ``middle`` have median
    and shuffled average precision.
    """
    often = (held.activity != 0).sum(0) >= config.minimum_firings
    if not often.any():
        return None
    fit, held = (part._replace(activity=part.activity[:, often]) for part in (fit, held))
    real = _scores(fit, held, config)
    null = _scores(fit.shuffled(2 * seed), held.shuffled(2 * seed + 1), config)
    result: dict[str, Any] = {
        "n_features": int(often.sum()),
        "base_rate": float(np.median((held.activity != 0).mean(0))),
    }
    for name, values in real.items():
        own: dict[str, Any] = {"median": float(np.median(values)), "shuffled": float(np.median(null[name]))}
        if name in ("all", "bits"):
            own["interval"] = median_interval(values, config.bootstraps, seed)
        result |= own if name == "all" else {name: own}
    return result


def median_interval(values: Floats, bootstraps: int, seed: int) -> list[float]:
    """95% percentile bootstrap interval of a median."""
    draws = np.random.default_rng(seed).integers(len(values), size=(bootstraps, len(values)))
    return [float(q) for q in np.quantile(np.median(values[draws], axis=1), (0.025, 0.975))]


def _scores(fit: Firings, held: Firings, config: PredictabilityConfig) -> dict[str, Floats]:
    probability, base = ngram_probabilities(fit, held, config.smoothing)
    fired = held.activity != 0
    found = {"all": [], "top": [], "middle": []}
    for i, own in enumerate(fired.T):
        silent, scores = (~own).astype(float), probability[:, i]
        found["all"].append(average_precision(scores, own.astype(float), silent))
        for name, chosen in _ranges(held.activity[:, i], own).items():
            found[name].append(average_precision(scores, chosen, silent))
    bits = 1.0 - _cross_entropy(fired, probability) / _cross_entropy(fired, np.broadcast_to(base, fired.shape))
    return {name: np.array(values) for name, values in found.items()} | {"bits": bits}


def _ranges(activity: Floats, fired: NDArray[np.bool_]) -> dict[str, Floats]:
    """The quarter of the firings with the largest activity, and the quarter around the median."""
    order = np.flatnonzero(fired)[np.argsort(-np.abs(activity[fired]), kind="stable")]
    quarter = max(1, len(order) // 4)
    start = (len(order) - quarter) // 2
    ranges = {}
    for name, chosen in (("top", order[:quarter]), ("middle", order[start : start + quarter])):
        ranges[name] = np.zeros(len(activity))
        ranges[name][chosen] = 1.0
    return ranges


def _cross_entropy(fired: NDArray[np.bool_], probability: Floats) -> Floats:
    p = probability.clip(1e-6, 1 - 1e-6)
    return -np.where(fired, np.log2(p), np.log2(1 - p)).mean(0)
