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
from crosshead.analysis.relations import POSITIONAL
from crosshead.maths.unimodality import unimodality

__all__ = ["describe_clusters"]

Record = dict[str, Any]
Floats = NDArray[np.float64]
_DRAWS_OF_POWER = 50
_LEAST_CLUSTER = 4
"""Features of a cluster whose OV dimension is compared: of one feature rank and random rank are both 1, and many such
ties would look like a mode."""
_LEVEL = 0.05 / 3
"""Of the test whose power is measured: 5% over the three dictionaries that the rule asks for (Bonferroni)."""


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
    brief: bool = False,
) -> Record:
    """Records ``enrichment`` and ``ov_dimensions``, and ``enrichment_summary``, ``size_correlations``, ``modality``.

    ``loadings`` [F, H]; in ``brief`` only OV dimensions are tested for one mode, and without the test's power. Empty
    where there are no loadings, or too few live features for two clusters of eight.
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
    measured = labels.measured()[features]
    records = enrichment(holds, measured, names, assigned)
    content = [i for i, name in enumerate(names) if name not in POSITIONAL]
    of_content = enrichment(holds[:, content], measured[:, content], [names[i] for i in content], assigned)
    rows = module.decoder.detach().double().cpu().numpy()[features]
    dimensions = ov_dimensions(rows, _power(module, text)[features], assigned, config)
    skip_trigram = text.skip_trigram_share()
    return {
        "enrichment": [{"k": k} | record for record in records],
        "enrichment_summary": {
            "discoveries": sum(record["q_value"] <= config.false_discovery_rate for record in records),
            "expected_under_shuffle": shuffled_discoveries(holds, measured, assigned, config),
            "tests": len(records),
            "content_discoveries": sum(record["q_value"] <= config.false_discovery_rate for record in of_content),
            "content_expected_under_shuffle": shuffled_discoveries(
                holds[:, content], measured[:, content], assigned, config
            ),
        },
        "ov_dimensions": [{"k": k} | record for record in dimensions],
        "size_correlations": {
            "induction": size_correlation(assigned, induction_share[features]),
            "skip_trigram": size_correlation(assigned, None if skip_trigram is None else skip_trigram[features]),
        },
        "modality": _modality(vectors, dimensions, simulations, seed, brief),
    }


def _power(module: Any, text: Moved) -> Floats:
    """Power that every feature writes on text [F]; of a value SAE, that of its own reconstruction."""
    if not hasattr(module, "query_head_loadings"):
        return text.power.numpy()
    entries, size = text.entries, module.decoder.detach().norm(dim=1).double().cpu().numpy()
    return np.bincount(entries.feature.numpy(), entries.value.double().numpy() ** 2, len(size)) * size**2


def _modality(vectors: Floats, dimensions: Sequence[Record], simulations: int, seed: int, brief: bool) -> Record:
    """Dip tests: OV dimension of clusters, and (unless ``brief``) the features' first principal loading coordinate.

    The OV dimension is the logarithm of the effective rank over that of random sets as large, because rank grows with
    size; clusters of fewer than four features are left out. Its ``power`` (unless ``brief``) is the share of two-mode
    samples of the same size that the test rejects at 5% over three dictionaries: half of the clusters four times as
    high as the others, each half spread as widely as the clusters of the real dictionary are around their median, at
    most by a factor of 1.5.
    """
    ratios = np.array([record["effective_rank"] / record["random_mean"] for record in dimensions
                       if record["size"] >= _LEAST_CLUSTER and record["effective_rank"] > 0
                       and record["random_mean"] > 0])  # fmt: skip
    found = {"ov_dimension": np.log(ratios)}
    if not brief:
        centred = vectors - vectors.mean(0)
        found["loadings"] = centred @ np.linalg.eigh(centred.T @ centred)[1][:, -1]
    tests = {name: unimodality(sample, simulations, seed) for name, sample in found.items()}
    records = {name: None if test is None else dict(test._asdict()) for name, test in tests.items()}
    if records["ov_dimension"] is not None and not brief:
        records["ov_dimension"]["power"] = _power_for_two_modes(found["ov_dimension"], simulations, seed)
    return records


def _power_for_two_modes(sample: Floats, simulations: int, seed: int) -> float:
    spread = min(float(np.median(np.abs(sample - np.median(sample)))) * 1.4826, float(np.log(1.5)))
    generator = np.random.default_rng(seed)
    step = np.log(4.0) * (np.arange(len(sample)) % 2)
    tests = [unimodality(step + spread * generator.standard_normal(len(sample)), simulations, seed)
             for _ in range(_DRAWS_OF_POWER)]  # fmt: skip
    return sum(test is not None and test.p_value <= _LEVEL for test in tests) / _DRAWS_OF_POWER
