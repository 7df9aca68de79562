import numpy as np
import pytest
from scipy.stats import hypergeom

from crosshead.analysis.cluster_meaning import _modality
from crosshead.analysis.enrichment import (
    EnrichmentConfig,
    effective_ranks,
    enrichment,
    ov_dimensions,
    shuffled_discoveries,
    size_correlation,
)
from crosshead.maths.unimodality import unimodality

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
    records = enrichment(labels, np.ones_like(labels), ("a", "b", "never"), clusters)
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
    found = {(r["cluster"], r["label"]) for r in enrichment(labels, np.ones_like(labels), ("a", "b", "never"), clusters)
             if r["q_value"] <= 0.05}  # fmt: skip
    assert found == {(0, "a")}
    assert shuffled_discoveries(labels, np.ones_like(labels), clusters, CONFIG) < 0.3


def test_clusters_of_few_features_are_no_mode_of_ov_dimensions():
    """Of one feature rank and random rank are both 1: their ties at zero would be a mode of their own."""
    spread = np.exp(np.random.default_rng(0).normal(-0.25, 0.15, 24))
    records = [{"size": 20, "effective_rank": 5.0 * ratio, "random_mean": 5.0} for ratio in spread]
    alone = [{"size": 1, "effective_rank": 1.0, "random_mean": 1.0}] * 10
    vectors = np.random.default_rng(0).normal(size=(50, 3))
    found, plain = (_modality(vectors, some, 200, 0, brief=True)["ov_dimension"] for some in (records + alone, records))
    assert found == plain
    assert found["n"] == 24
    assert found["p_value"] > 0.05
    assert unimodality(np.log(np.concatenate([spread, np.ones(10)])), 200, 0).p_value < 0.05


def test_no_labels_no_records():
    clusters = np.repeat(np.arange(4), 10)
    none, every = np.zeros((40, 2), dtype=bool), np.ones((40, 2), dtype=bool)
    assert enrichment(none, every, ("a", "b"), clusters) == []
    assert shuffled_discoveries(none, every, clusters, CONFIG) == 0.0


def test_a_cluster_whose_features_are_active_often_enough_is_not_enriched_for_that():
    """Cluster 0 alone can be measured much; half of what can be measured has the label, in every cluster."""
    clusters = np.repeat(np.arange(10), 40)
    measured = (np.arange(400) % 40 < np.where(clusters == 0, 40, 4))[:, None]
    labels = measured & (np.arange(400) % 2 == 0)[:, None]
    assert min(r["q_value"] for r in enrichment(labels, np.ones_like(labels), ("a",), clusters)) < 1e-6
    records = enrichment(labels, measured, ("a",), clusters)
    assert min(r["q_value"] for r in records) > 0.5
    assert [(r["n"], r["size"], r["expected"]) for r in records[:2]] == [(20, 40, 20.0), (2, 4, 2.0)]
    assert shuffled_discoveries(labels, measured, clusters, CONFIG) < 0.3


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
