"""Labels of features: what they move or where they fire, by thresholds on shares above a base rate.

Shape legend: F features, L labels.

A feature gets a label when its share s, with s0 expected by chance, has (s - s0) / (1 - s0) at or above the label's
threshold and it is active often enough. Every rule is run again on draws of its null, and the mean number of features
that get the label then is reported beside the count (design choice; after Jermyn et al., Progress on Attention, 2025).

- induction, previous_token, duplicate_token, same_position: shares of moved mass on repeated random tokens, where
  nothing but repetition can be attended to; null: keys drawn uniformly.
- delimiter: share of activation at tokens without letter or digit, on text; null: positions drawn anew. Of moved mass
  it would follow from the loadings: a head that looks at punctuation would make delimiters of all its features. Where a
  dictionary reads the query side: share of moved mass, null as above.
- code: share of mass in code contexts, every context weighing alike; null: domains dealt anew to contexts.
- succession: mass on an ordered list over mass on it and its shuffled twin, mean over the pairs with any; null: ordered
  and shuffled exchanged at random, pair by pair.
- none: live features without any of these.

There is no label for the beginning-of-text token: features are zero there, dictionaries carry it in a term of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from crosshead.analysis.moved import Moved

__all__ = ["Evidence", "FeatureLabels", "LabelConfig", "domain_evidence", "label_features", "pair_evidence",
           "source_evidence", "succession_evidence"]  # fmt: skip

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Share = Annotated[float, Field(gt=0, le=1)]


class LabelConfig(BaseModel):
    """Thresholds on (share - expected) / (1 - expected), and how much evidence a label needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    induction: Share = 0.5
    """Of mass at repeated tokens: from the token after the earlier occurrence."""
    previous_token: Share = 0.5
    """Of mass: from the token before."""
    duplicate_token: Share = 0.5
    """Of mass at repeated tokens: from the earlier occurrence itself."""
    same_position: Share = 0.5
    """Of mass: not moved at all."""
    delimiter: Share = 0.6
    """Of activation on text: at tokens without letter or digit."""
    code: Share = 0.8
    """Of mass on text: in code contexts."""
    succession: Share = 0.5
    """Of mass on lists: on ordered ones, beyond the half expected."""
    minimum_firings: Annotated[int, Field(gt=0)] = 10
    """Active positions that shares of moved mass need."""
    minimum_contexts: Annotated[int, Field(gt=0)] = 5
    """Active contexts that the label code needs."""
    minimum_pairs: Annotated[int, Field(gt=0)] = 12
    """Pairs of lists that the label succession needs activity on."""
    minimum_families: Annotated[int, Field(gt=0)] = 3
    """Kinds of lists (days, months, ...) among them."""
    draws: Annotated[int, Field(gt=0)] = 4
    """Draws of every null but that of succession."""
    exchanges: Annotated[int, Field(gt=0)] = 200
    """Draws of succession's null: few features have the label, so their number is tested as well."""


class Evidence(NamedTuple):
    """What one label is decided on."""

    share: Floats
    """[F]; NaN: not measured."""
    expected: Floats
    """[F], by chance."""
    null: Floats
    """[draws, F]."""
    enough: Bools
    """[F], active often enough."""


class FeatureLabels(NamedTuple):
    """Which features have which labels; the last label is ``none``."""

    names: tuple[str, ...]
    holds: Bools
    """[F, L]."""
    expected: Floats
    """[L], mean number of features under the null."""
    p_value: Floats
    """[L], share of draws with as many features or more, the count itself among them; NaN for ``none``."""
    score: Floats
    """[F, L-1], (share - expected) / (1 - expected); NaN: not measured."""
    evidence: Mapping[str, Evidence]

    def counts(self) -> dict[str, dict[str, float]]:
        """``{label: {count, expected, p_value}}``; a p-value that could not fall below 5% is left out as None."""
        return {name: {"count": int(self.holds[:, i].sum()), "expected": float(self.expected[i]),
                       "p_value": float(self.p_value[i]) if self._testable(name) else None}
                for i, name in enumerate(self.names)}  # fmt: skip

    def _testable(self, name: str) -> bool:
        return name in self.evidence and 1 / (1 + len(self.evidence[name].null)) < 0.05

    def measured(self) -> Bools:
        """Which features were active often enough for which label [F, L-1]."""
        return np.stack([e.enough & np.isfinite(e.share) for e in self.evidence.values()], axis=1)

    def of(self, name: str) -> Bools:
        """The features with one label [F]; none where it was not measured."""
        return self.holds[:, self.names.index(name)] if name in self.names else np.zeros(len(self.holds), dtype=bool)


def label_features(evidence: Mapping[str, Evidence], live: Bools, config: LabelConfig) -> FeatureLabels:
    """Label live features by whatever was measured."""
    scores = np.stack([_score(e.share, e.expected) for e in evidence.values()], axis=1)
    held = [_held(e.share, name, e, live, config) for name, e in evidence.items()]
    drawn = [np.stack([_held(null, name, e, live, config) for null in e.null]) for name, e in evidence.items()]
    counts = [each.sum(1) for each in drawn]
    n_common = min(len(each) for each in drawn)
    none = [(live & ~np.any([each[draw] for each in drawn], axis=0)).sum() for draw in range(n_common)]
    expected = np.array([*(count.mean() for count in counts), np.mean(none)])
    p_value = [(1 + (count >= own.sum()).sum()) / (1 + len(count)) for count, own in zip(counts, held, strict=True)]
    holds = np.stack([*held, live & ~np.any(held, axis=0)], axis=1)
    return FeatureLabels((*evidence, "none"), holds, expected, np.array([*p_value, np.nan]), scores, evidence)


def _held(share: Floats, name: str, evidence: Evidence, live: Bools, config: LabelConfig) -> Bools:
    """Which features would have a label if these were their shares [F]."""
    score = np.nan_to_num(_score(share, evidence.expected), nan=-1.0)
    return (score >= getattr(config, name)) & evidence.enough & live


def _score(share: Floats, expected: Floats) -> Floats:
    return (share - expected) / np.maximum(1.0 - expected, 1e-9)


def pair_evidence(found: Moved, relation: str, config: LabelConfig) -> Evidence:
    """Shares of moved mass in a relation of query and key."""
    enough = found.firings.numpy() >= config.minimum_firings
    return Evidence(found.share(relation), found.expected_share(relation), found.null_shares(relation), enough)


def source_evidence(found: Moved, delimiter: Bools, config: LabelConfig, seed: int) -> Evidence:
    """Share of activation at delimiter positions [n, T], of features that live at the source; null: positions drawn."""
    entries = found.entries
    on = delimiter[entries.context.numpy(), entries.anchor.numpy()]
    share = _weighted(found, on)
    base = float(delimiter[:, 1:].mean())
    generator = np.random.default_rng(seed)
    null = np.stack([_weighted(found, generator.random(len(on)) < base) for _ in range(config.draws)])
    enough = found.firings.numpy() >= config.minimum_firings
    return Evidence(share, np.full(len(share), base), null, enough)


def _weighted(found: Moved, on: Bools) -> Floats:
    feature, mass = found.entries.feature.numpy(), found.entries.value.abs().double().numpy()
    n_features = len(found.firings)
    part, whole = np.bincount(feature, mass * on, n_features), np.bincount(feature, mass, n_features)
    return np.divide(part, whole, out=np.full(n_features, np.nan), where=whole > 0)


def domain_evidence(found: Moved, domains: Sequence[str], domain: str, config: LabelConfig, seed: int) -> Evidence:
    """Share of mass in contexts of a domain. Contexts of one document count as independent."""
    mass = found.context_mass.numpy()
    own = np.array([name == domain for name in domains])
    generator = np.random.default_rng(seed)
    null = np.stack([_domain_share(mass, generator.permutation(own)) for _ in range(config.draws)])
    enough = (mass > 0).sum(0) >= config.minimum_contexts
    return Evidence(_domain_share(mass, own), np.full(mass.shape[1], 0.5), null, enough)


def _domain_share(mass: Floats, own: Bools) -> Floats:
    """Mean mass per context of the domain over that plus the mean of the others, so that half is expected."""
    inside, outside = mass[own].mean(0), mass[~own].mean(0)
    return np.divide(inside, inside + outside, out=np.full(mass.shape[1], np.nan), where=inside + outside > 0)


def succession_evidence(found: Moved, families: Sequence[str], config: LabelConfig, seed: int) -> Evidence:
    """Share of the ordered text (in the first half of the contexts) in every pair; text i + P is the twin of text i."""
    ordered, shuffled = np.split(found.context_mass.numpy(), 2)
    names: Any = np.array(families)
    both = ordered + shuffled
    active = both > 0
    n_families = np.stack([active[names == name].any(0) for name in dict.fromkeys(families)]).sum(0)
    enough = (active.sum(0) >= config.minimum_pairs) & (n_families >= config.minimum_families)
    beyond_half = np.divide(ordered, both, out=np.full(both.shape, 0.5), where=active) - 0.5
    generator = np.random.default_rng(seed)
    signs = [np.ones(len(both)), *(generator.choice([-1.0, 1.0], size=len(both)) for _ in range(config.exchanges))]
    n_active = np.where(active.any(0), active.sum(0), np.nan)
    shares = [0.5 + sign @ beyond_half / n_active for sign in signs]
    return Evidence(shares[0], np.full(both.shape[1], 0.5), np.stack(shares[1:]), enough)
