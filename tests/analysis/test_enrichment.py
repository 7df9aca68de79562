import numpy as np
import pytest
from scipy.stats import hypergeom

from crosshead.analysis.enrichment import (
    EnrichmentConfig,
    effective_ranks,
    enrichment,
    ov_dimensions,
    shuffled_discoveries,
    size_correlation,
)

CONFIG = EnrichmentConfig(shuffles=40)


def planted(seed: int = 0):
    """Ten clusters of 40; cluster 0 holds nearly all of label a, label b lies anywhere."""
    generator = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(10), 40)
    labels = np.zeros((400, 3), dtype=bool)
    labels[:30, 0] = True
    labels[350:355, 0] = True
    labels[:, 1] = generator.random(400) < 0.2
    return labels, clusters


def test_p_values_are_hypergeometric_tails_and_q_values_those_of_benjamini_and_hochberg():
    labels, clusters = planted()
    records = enrichment(labels, ("a", "b", "never"), clusters)
    assert {record["label"] for record in records} == {"a", "b"}
    first = next(r for r in records if (r["cluster"], r["label"]) == (0, "a"))
    assert (first["n"], first["size"], first["expected"]) == (30, 40, pytest.approx(3.5))
    assert first["p_value"] == pytest.approx(sum(hypergeom.pmf(range(30, 36), 400, 35, 40)), rel=1e-9)
    p = sorted(record["p_value"] for record in records)
    by_hand = {value: min(min(1.0, p[j] * len(p) / (j + 1)) for j in range(i, len(p))) for i, value in enumerate(p)}
    for record in records:
        assert record["q_value"] == pytest.approx(by_hand[record["p_value"]])


def test_the_planted_cluster_is_discovered_and_shuffled_labels_are_not():
    labels, clusters = planted()
    found = {(r["cluster"], r["label"]) for r in enrichment(labels, ("a", "b", "never"), clusters)
             if r["q_value"] <= 0.05}  # fmt: skip
    assert found == {(0, "a")}
    assert shuffled_discoveries(labels, clusters, CONFIG) < 0.3


def test_no_labels_no_records():
    clusters = np.repeat(np.arange(4), 10)
    assert enrichment(np.zeros((40, 2), dtype=bool), ("a", "b"), clusters) == []
    assert shuffled_discoveries(np.zeros((40, 2), dtype=bool), clusters, CONFIG) == 0.0


def test_planted_clusters_have_their_dimension_and_random_sets_have_more():
    generator = np.random.default_rng(0)
    line = generator.normal(size=(1, 30)) * np.where(generator.random(60) < 0.5, -1, 3)[:, None]
    five = np.eye(5, 30)[np.arange(60) % 5] * 2.0
    rest = generator.normal(size=(120, 30))
    clusters = np.repeat([0, 1, 2], [60, 60, 120])
    records = ov_dimensions(np.concatenate([line, five, rest]), np.ones(240), clusters, CONFIG)
    assert records[0]["effective_rank"] == pytest.approx(1.0)
    assert records[1]["effective_rank"] == pytest.approx(5.0)
    assert records[1]["participation"] == pytest.approx(5.0)
    assert records[2]["effective_rank"] > 20
    assert records[0]["effective_rank"] < records[0]["random_low"] < records[0]["random_mean"]


def test_features_count_by_the_power_they_write():
    rows = np.eye(3)
    assert effective_ranks(rows, np.array([1.0, 1.0, 0.0]))[0] == pytest.approx(2.0)
    rank, participation = effective_ranks(rows, np.array([8.0, 1.0, 1.0]))
    assert rank == pytest.approx(np.exp(-(0.8 * np.log(0.8) + 0.2 * np.log(0.1))))
    assert participation == pytest.approx(1 / 0.66)
    assert effective_ranks(rows, np.zeros(3)) == (0.0, 0.0)
    wide = np.random.default_rng(0).normal(size=(5, 9))
    tall = np.concatenate([wide, wide, wide])
    assert effective_ranks(tall, np.ones(15)) == pytest.approx(effective_ranks(wide, np.ones(5)))


def test_size_goes_with_a_share_that_was_planted_so():
    clusters = np.repeat(np.arange(6), [5, 10, 20, 40, 80, 160])
    shares = clusters / 10.0
    assert size_correlation(clusters, shares)["rho"] == pytest.approx(1.0)
    assert size_correlation(clusters, -shares)["rho"] == pytest.approx(-1.0)
    shares[:5] = np.nan
    assert size_correlation(clusters, shares)["n"] == 5
    assert size_correlation(clusters, np.ones(315)) is None
    assert size_correlation(clusters, np.full(315, np.nan)) is None
    assert size_correlation(clusters, None) is None
