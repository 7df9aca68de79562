"""Which labels the clusters of head-loading space hold more of than chance, and how many directions they write.

Shape legend: n clustered features, L labels, k clusters, D width of a decoder row.

- Enrichment: hypergeometric probability of at least as many features with the label in a cluster, among the features
  that are active often enough to carry it (else a cluster of busy features would be enriched); false discovery rate by
  Benjamini and Hochberg over all clusters and labels of a run. Control: labels dealt anew.
- OV dimension of a cluster: effective rank of its decoder rows, unit vectors weighted by the power that each feature
  writes: exp of the entropy, and participation ratio, of the squared singular values. Control: random sets of live
  features of the same size.
- Does size go with content: Spearman's rank correlation, over clusters, of size with the mean share of induction and
  of skip-trigrams.

After Jermyn et al., Progress on Attention (2025); the controls are a design choice.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from scipy.stats import false_discovery_control, hypergeom, spearmanr

__all__ = ["EnrichmentConfig", "effective_ranks", "enrichment", "ov_dimensions", "shuffled_discoveries",
           "size_correlation"]  # fmt: skip

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Clusters = NDArray[np.int64]


class EnrichmentConfig(BaseModel):
    """The clustering that is looked into, and its controls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    k: Annotated[int, Field(ge=2)] = 32
    """Clusters of k-means; fewer where there are fewer different vectors, or under eight live features for each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of k-means."""
    false_discovery_rate: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """A cluster counts as enriched at or below it."""
    shuffles: Annotated[int, Field(gt=0)] = 100
    """Times that labels are dealt anew."""
    random_sets: Annotated[int, Field(gt=0)] = 40
    """Random sets of features behind every cluster's expected OV dimension."""


def enrichment(labels: Bools, measured: Bools, names: Sequence[str], clusters: Clusters) -> list[dict[str, Any]]:
    """A record ``{cluster, size, label, n, expected, p_value, q_value}`` per cluster and label that occurs at all.

    ``measured`` [n, L] says which features could have the label; ``size`` counts those of the cluster.
    """
    counts, expected, p_values, sizes = _tests(labels, measured, clusters)
    used = [i for i in range(len(names)) if labels[:, i].any()]
    if not used:
        return []
    q_values = _q_values(p_values[:, used])
    return [
        {"cluster": c, "size": int(sizes[c, i]), "label": names[i], "n": int(counts[c, i]),
         "expected": float(expected[c, i]), "p_value": float(p_values[c, i]), "q_value": float(q_values[c, j])}
        for c in range(len(sizes)) for j, i in enumerate(used)
    ]  # fmt: skip


def shuffled_discoveries(labels: Bools, measured: Bools, clusters: Clusters, config: EnrichmentConfig) -> float:
    """Mean number of discoveries when features are dealt anew to the clusters, with all that was measured of them."""
    used = labels.any(0)
    if not used.any():
        return 0.0
    labels, measured = labels[:, used], measured[:, used]
    generator = np.random.default_rng(config.seed)
    found = [
        (_q_values(_tests(labels, measured, generator.permutation(clusters))[2]) <= config.false_discovery_rate).sum()
        for _ in range(config.shuffles)
    ]
    return float(np.mean(found))


def _tests(labels: Bools, measured: Bools, clusters: Clusters) -> tuple[Floats, Floats, Floats, Floats]:
    """Counts, expected counts, p-values and numbers of measured features, all [k, L]."""
    members = (clusters == np.arange(clusters.max() + 1)[:, None]).astype(float)
    counts, sizes = members @ (labels & measured), members @ measured
    totals, n_features = (labels & measured).sum(0), measured.sum(0)
    p_values = hypergeom.sf(counts - 1, n_features, totals, sizes)
    return counts, sizes * totals / np.maximum(n_features, 1), p_values.clip(0.0, 1.0), sizes


def _q_values(p_values: Floats) -> Floats:
    return false_discovery_control(p_values.ravel()).reshape(p_values.shape)


def effective_ranks(rows: Floats, power: Floats) -> tuple[float, float]:
    """Exp of the entropy, and the participation ratio, of the squared singular values of power-weighted unit rows.

    (0, 0) where nothing is written.
    """
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    weighted = rows / np.maximum(norms, 1e-30) * np.sqrt(power)[:, None]
    gram = weighted @ weighted.T if len(rows) <= rows.shape[1] else weighted.T @ weighted
    spectrum = np.linalg.eigvalsh(gram).clip(min=0.0)
    total = spectrum.sum()
    if total <= 0:
        return 0.0, 0.0
    shares = spectrum / total
    positive = shares[shares > 0]
    return float(np.exp(-(positive * np.log(positive)).sum())), float(1.0 / (shares**2).sum())


def ov_dimensions(rows: Floats, power: Floats, clusters: Clusters, config: EnrichmentConfig) -> list[dict[str, Any]]:
    """A record per cluster: ``{cluster, size, effective_rank, participation, random_mean, random_low, random_high}``.

    The last three are the mean and the 95% range of the effective rank of random sets of the same size.
    """
    generator = np.random.default_rng(config.seed)
    records, known = [], {}
    for c in range(int(clusters.max()) + 1):
        members = np.flatnonzero(clusters == c)
        size = len(members)
        if size not in known:
            drawn = [generator.permutation(len(rows))[:size] for _ in range(config.random_sets)]
            known[size] = np.array([effective_ranks(rows[own], power[own])[0] for own in drawn])
        rank, participation = effective_ranks(rows[members], power[members])
        low, high = np.quantile(known[size], (0.025, 0.975))
        records.append({"cluster": c, "size": size, "effective_rank": rank, "participation": participation,
                        "random_mean": float(known[size].mean()), "random_low": float(low),
                        "random_high": float(high)})  # fmt: skip
    return records


def size_correlation(clusters: Clusters, shares: Floats | None) -> Mapping[str, float] | None:
    """Spearman's correlation of cluster size with the mean share in the cluster, NaN shares left out.

    ``{rho, p_value, n}``; None where fewer than four clusters have a share or one side does not vary.
    """
    if shares is None:
        return None
    pairs = []
    for c in range(int(clusters.max()) + 1):
        own = shares[clusters == c]
        if np.isfinite(own).any():
            pairs.append((len(own), float(np.nanmean(own))))
    sizes, means = np.array(pairs).reshape(-1, 2).T
    if len(pairs) < 4 or len(set(sizes)) < 2 or len(set(means)) < 2:
        return None
    found: Any = spearmanr(sizes, means)
    return {"rho": float(found.statistic), "p_value": float(found.pvalue), "n": len(pairs)}
