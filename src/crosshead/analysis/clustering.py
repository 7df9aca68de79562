"""Clusters in head-loading space, and the distribution of their sizes.

Shape legend: F features (live ones only), H heads.

A feature's loading vector is what it puts on each real head, flipped so that its largest entry is positive, with unit
norm. k-means over a sweep of k; sizes of every clustering, power-law fits where k is large enough (Clauset, Shalizi
and Newman 2009). k-means sizes are no independent sample - they sum to F, and k-means favours cells of equal variance
- so the same analysis runs on nulls: loadings shuffled among features head by head, Gaussian vectors of the same
covariance, and the uniform sphere. A claim stands only where data and nulls differ. HDBSCAN, which finds its own number
of clusters and leaves features out, is the cross-check. After Jermyn et al., Progress on Attention (2025); the nulls
are a design choice.

Above 20,000 features k-means reads mini-batches, and HDBSCAN a sample of 20,000.
"""

from collections.abc import Iterable
from itertools import combinations
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.cluster import HDBSCAN, KMeans, MiniBatchKMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits

from crosshead.maths.powerlaw import fit_power_law, goodness_of_fit, likelihood_ratios

__all__ = ["ClusterConfig", "analyse_loadings", "cluster_labels", "clustered", "loading_vectors"]

Vectors = NDArray[np.float64]
_LARGE = 20_000


class ClusterConfig(BaseModel):
    """Parameters of the clustering stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: Annotated[tuple[str, ...], Field(min_length=1)]
    """Training runs whose head loadings are clustered."""
    largest_k: Annotated[int, Field(ge=2)] = 256
    """k runs over powers of two, from 64 on with a half step between them, up to this and up to an eighth of the live
    features."""
    seeds: Annotated[int, Field(ge=1)] = 3
    """Seeds of k-means for every k."""
    minimum_k_for_fit: Annotated[int, Field(ge=2)] = 64
    """Smallest k whose sizes are fitted."""
    bootstraps: Annotated[int, Field(gt=0)] = 100
    """Synthetic samples behind every p-value."""
    hdbscan_minimum: Annotated[int, Field(ge=2)] = 8
    """Smallest cluster of HDBSCAN."""


def clustered(loadings: Vectors, live: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Numbers of the features that ``loading_vectors`` keeps, in its order."""
    return np.flatnonzero(live & (np.linalg.norm(np.asarray(loadings, dtype=float), axis=1) > 0))


def loading_vectors(loadings: Vectors, live: NDArray[np.bool_]) -> Vectors:
    """Loading vectors [F, H] of the live features: largest entry positive, unit norm; all-zero rows are dropped."""
    vectors = np.asarray(loadings, dtype=float)[clustered(loadings, live)]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1)
    return vectors * np.sign(largest) / np.linalg.norm(vectors, axis=1, keepdims=True)


def analyse_loadings(source: str, loadings: Vectors, live: NDArray[np.bool_], config: ClusterConfig) -> dict[str, Any]:
    """Cluster one dictionary's loadings and its nulls.

    Returns ``clusters`` (a record per source, k and seed that was fitted), ``sizes`` (``{source, k, seed, sizes}``,
    largest first), ``agreement`` (``{source, k, adjusted_rand}``: mean over pairs of seeds) and ``hdbscan`` (``{source,
    n_clusters, unassigned, k, adjusted_rand}``: share of features in no cluster, agreement on the others with the
    k-means of the nearest k). Nulls have sources ``<source>/shuffled``, ``<source>/gaussian`` and ``<source>/sphere``.
    """
    vectors = loading_vectors(loadings, live)
    results: dict[str, Any] = {"clusters": [], "sizes": [], "agreement": [], "hdbscan": [],
                               "n_features": {source: len(vectors)}}  # fmt: skip
    for name, sample in _with_nulls(source, vectors):
        first: dict[int, NDArray[np.int64]] = {}
        for k in _ks(len(sample), config.largest_k):
            labels = [cluster_labels(sample, k, seed) for seed in range(config.seeds)]
            first[k] = labels[0]
            for seed, own in enumerate(labels):
                sizes = np.sort(np.bincount(own, minlength=k))[::-1]
                results["sizes"].append({"source": name, "k": k, "seed": seed, "sizes": sizes.tolist()})
                if k >= config.minimum_k_for_fit:
                    results["clusters"].append(_fit_record(name, k, seed, sizes, config.bootstraps))
            results["agreement"].append({"source": name, "k": k, "adjusted_rand": _agreement(labels)})
        results["hdbscan"].append({"source": name} | _by_density(sample, first, config.hdbscan_minimum))
    return results


def _ks(n_features: int, largest: int) -> list[int]:
    steps = [2**i for i in range(1, 20)] + [3 * 2**i for i in range(5, 19)]
    return sorted(k for k in steps if k <= min(largest, n_features // 8))


def _with_nulls(source: str, vectors: Vectors) -> Iterable[tuple[str, Vectors]]:
    yield source, vectors
    generator = np.random.default_rng(0)
    shuffled = np.stack([generator.permutation(column) for column in vectors.T], axis=1).astype(float)
    yield f"{source}/shuffled", loading_vectors(shuffled, np.ones(len(shuffled), dtype=bool))
    gaussian = generator.multivariate_normal(vectors.mean(0), np.cov(vectors.T), size=len(vectors), method="eigh")
    yield f"{source}/gaussian", loading_vectors(gaussian, np.ones(len(gaussian), dtype=bool))
    sphere = generator.normal(size=vectors.shape)
    if (vectors >= 0).all():  # norms: the part of the sphere they can lie on
        sphere = np.abs(sphere)
    yield f"{source}/sphere", loading_vectors(sphere, np.ones(len(sphere), dtype=bool))


def cluster_labels(vectors: Vectors, k: int, seed: int) -> NDArray[np.int64]:
    """The cluster of every feature, by k-means; by mini-batches above 20,000 features."""
    kind = KMeans if len(vectors) <= _LARGE else MiniBatchKMeans
    # One thread: with more, sums depend on who finishes first, and a boundary feature could change its cluster.
    with threadpool_limits(1):
        return kind(n_clusters=k, n_init="auto", random_state=seed).fit_predict(vectors)


def _by_density(vectors: Vectors, by_k: dict[int, NDArray[np.int64]], minimum: int) -> dict[str, Any]:
    """HDBSCAN, and how far k-means at the nearest k agrees on the features it assigns."""
    chosen = np.arange(len(vectors))
    if len(vectors) > _LARGE:
        chosen = np.sort(np.random.default_rng(0).permutation(len(vectors))[:_LARGE])
    if len(chosen) < minimum:
        return {"n_clusters": 0, "unassigned": 1.0, "k": None, "adjusted_rand": None}
    with threadpool_limits(1):
        density = HDBSCAN(min_cluster_size=minimum, copy=True)  # pyright: ignore[reportArgumentType]
        found = density.fit_predict(vectors[chosen])
    assigned, n_clusters = found >= 0, int(found.max()) + 1
    record = {"n_clusters": n_clusters, "unassigned": float(1.0 - assigned.mean())}
    if not by_k or not assigned.any():
        return record | {"k": None, "adjusted_rand": None}
    k = min(by_k, key=lambda k: (abs(k - n_clusters), k))
    return record | {"k": k, "adjusted_rand": float(adjusted_rand_score(found[assigned], by_k[k][chosen][assigned]))}


def _agreement(labels: list[NDArray[np.int64]]) -> float | None:
    pairs = [adjusted_rand_score(a, b) for a, b in combinations(labels, 2)]
    return float(np.mean(pairs)) if pairs else None


def _fit_record(source: str, k: int, seed: int, sizes: NDArray[np.int64], bootstraps: int) -> dict[str, Any]:
    record: dict[str, Any] = {"source": source, "k": k, "seed": seed, "n_clusters": int((sizes > 0).sum())}
    fit = fit_power_law(sizes[sizes > 0])
    if fit is None:
        return record | dict.fromkeys(("alpha", "x_min", "ks", "n_tail", "p_value", "likelihood_ratios"))
    ratios = likelihood_ratios(sizes[sizes > 0], fit)
    return record | {
        "alpha": fit.alpha,
        "x_min": fit.x_min,
        "ks": fit.ks,
        "n_tail": fit.n_tail,
        "p_value": goodness_of_fit(sizes[sizes > 0], fit, bootstraps=bootstraps, seed=seed),
        "likelihood_ratios": {name: {"ratio": r.ratio, "p_value": r.p_value} for name, r in ratios.items()},
    }
