"""What one dictionary's clusters of head loadings mean: enriched labels, directions written, content against size.

Shape legend: F features, H heads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosshead.analysis.clustering import cluster_labels, clustered, loading_vectors
from crosshead.analysis.enrichment import (
    EnrichmentConfig,
    enrichment,
    ov_dimensions,
    shuffled_discoveries,
    size_correlation,
)
from crosshead.analysis.labels import FeatureLabels
from crosshead.analysis.moved import Moved
from crosshead.maths.unimodality import unimodality

__all__ = ["describe_clusters"]

Record = dict[str, Any]
Floats = NDArray[np.float64]


def describe_clusters(
    module: Any,
    loadings: Floats | None,
    live: NDArray[np.bool_],
    labels: FeatureLabels,
    text: Moved,
    induction_share: Floats,
    config: EnrichmentConfig,
    *,
    simulations: int,
    seed: int,
) -> Record:
    """Records ``enrichment`` and ``ov_dimensions``, and ``enrichment_summary``, ``size_correlations``, ``modality``.

    ``loadings`` [F, H]; empty where there are none, or too few live features for two clusters of eight.
    """
    if loadings is None:
        return {}
    vectors, features = loading_vectors(loadings, live), clustered(loadings, live)
    # Features with one head each have one vector per head: there are no more clusters than that.
    k = min(config.k, len(vectors) // 8, len(np.unique(vectors.round(6), axis=0)))
    if k < 2:
        return {}
    assigned = cluster_labels(vectors, k, config.seed)
    holds, names = labels.holds[features, :-1], labels.names[:-1]  # without ``none``, which is no meaning
    records = enrichment(holds, names, assigned)
    rows = module.decoder.detach().double().cpu().numpy()[features]
    dimensions = ov_dimensions(rows, _power(module, text)[features], assigned, config)
    skip_trigram = text.skip_trigram_share()
    return {
        "enrichment": [{"k": k} | record for record in records],
        "enrichment_summary": {
            "discoveries": sum(record["q_value"] <= config.false_discovery_rate for record in records),
            "expected_under_shuffle": shuffled_discoveries(holds, assigned, config),
            "tests": len(records),
        },
        "ov_dimensions": [{"k": k} | record for record in dimensions],
        "size_correlations": {
            "induction": size_correlation(assigned, induction_share[features]),
            "skip_trigram": size_correlation(assigned, None if skip_trigram is None else skip_trigram[features]),
        },
        "modality": _modality(vectors, dimensions, simulations, seed),
    }


def _power(module: Any, text: Moved) -> Floats:
    """Power that every feature writes on text [F]; of a value SAE, that of its own reconstruction."""
    if not hasattr(module, "query_head_loadings"):
        return text.power.numpy()
    entries, size = text.entries, module.decoder.detach().norm(dim=1).double().cpu().numpy()
    return np.bincount(entries.feature.numpy(), entries.value.double().numpy() ** 2, len(size)) * size**2


def _modality(vectors: Floats, dimensions: Sequence[Record], simulations: int, seed: int) -> Record:
    """Dip tests: log OV dimension of clusters, and the features' first principal loading coordinate."""
    ranks = np.array([record["effective_rank"] for record in dimensions])
    centred = vectors - vectors.mean(0)
    first = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    found = {"ov_dimension": np.log(ranks[ranks > 0]), "loadings": first}
    tests = {name: unimodality(sample, simulations, seed) for name, sample in found.items()}
    return {name: None if test is None else dict(test._asdict()) for name, test in tests.items()}
