import numpy as np
import pytest

from crosshead.analysis import clustering
from crosshead.analysis.clustering import ClusterConfig, analyse_loadings, loading_vectors

CONFIG = ClusterConfig(runs=("r",), largest_k=64, seeds=2, minimum_k_for_fit=32, bootstraps=5)


def planted(sizes: list[int], heads: int = 9, seed: int = 0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(len(sizes), heads))
    rows = [c + 0.01 * generator.normal(size=(n, heads)) for c, n in zip(centres, sizes, strict=True)]
    return np.concatenate(rows)


def test_vectors_are_flipped_scaled_and_without_dead_features():
    loadings = np.array([[-3.0, 4.0], [-8.0, 6.0], [0.0, 0.0], [1.0, 1.0]])
    vectors = loading_vectors(loadings, np.array([True, True, True, False]))
    assert vectors == pytest.approx(np.array([[-0.6, 0.8], [0.8, -0.6]]))


def test_planted_clusters_are_found_with_their_sizes():
    loadings = planted([300, 100, 60, 52])
    result = analyse_loadings("x", loadings, np.ones(512, dtype=bool), CONFIG)
    at_four = [s["sizes"] for s in result["sizes"] if s["source"] == "x" and s["k"] == 4]
    assert [300, 100, 60, 52] in at_four


def test_every_null_gets_the_same_analysis():
    result = analyse_loadings("x", planted([256, 256]), np.ones(512, dtype=bool), CONFIG)
    sources = {"x", "x/shuffled", "x/gaussian", "x/sphere"}
    assert {s["source"] for s in result["sizes"]} == sources
    assert {(c["source"], c["k"]) for c in result["clusters"]} == {(s, k) for s in sources for k in (32, 64)}
    assert result["n_features"] == {"x": 512}
    assert [h["source"] for h in result["hdbscan"]] == ["x", "x/shuffled", "x/gaussian", "x/sphere"]


def test_hdbscan_finds_planted_clusters_and_next_to_nothing_on_the_sphere():
    result = analyse_loadings("x", planted([200, 150, 100, 62]), np.ones(512, dtype=bool), CONFIG)
    found = {h["source"]: h for h in result["hdbscan"]}
    assert found["x"]["n_clusters"] == found["x"]["k"] == 4
    assert found["x"]["unassigned"] < 0.2
    assert found["x"]["adjusted_rand"] == pytest.approx(1.0)
    assert found["x/sphere"]["unassigned"] > 0.3


def test_the_sphere_is_uniform_up_to_the_flip_and_positive_where_the_data_are():
    """Norms cannot leave the positive part, so their null must not either."""
    for vectors in (planted([256, 256]), np.abs(planted([256, 256]))):
        vectors = clustering.loading_vectors(vectors, np.ones(512, dtype=bool))
        sphere = dict(clustering._with_nulls("x", vectors))["x/sphere"]
        assert np.linalg.norm(sphere, axis=1) == pytest.approx(1.0)
        assert bool((sphere >= 0).all()) == bool((vectors >= 0).all())
        assert (sphere**2).mean(0) == pytest.approx(1 / 9, abs=0.03)


def test_many_features_are_clustered_by_mini_batches(monkeypatch):
    monkeypatch.setattr(clustering, "_LARGE", 300)
    result = analyse_loadings("x", planted([300, 100, 60, 52]), np.ones(512, dtype=bool), CONFIG)
    at_four = [s["sizes"] for s in result["sizes"] if s["source"] == "x" and s["k"] == 4]
    assert [300, 100, 60, 52] in at_four
    assert result["hdbscan"][0]["n_clusters"] == 4


def test_seeds_agree_on_planted_clusters_more_than_on_shuffled_loadings():
    result = analyse_loadings("x", planted([128] * 4), np.ones(512, dtype=bool), CONFIG)
    agreement = {(a["source"], a["k"]): a["adjusted_rand"] for a in result["agreement"]}
    assert agreement["x", 4] > agreement["x/gaussian", 4]


def test_k_stays_below_an_eighth_of_the_live_features():
    result = analyse_loadings("x", planted([100, 100]), np.ones(200, dtype=bool), CONFIG)
    assert max(s["k"] for s in result["sizes"]) == 16


def test_from_64_on_k_takes_half_steps_so_that_a_few_dead_features_leave_three_sizes():
    assert clustering._ks(2040, 256) == [2, 4, 8, 16, 32, 64, 96, 128, 192]
    assert clustering._ks(1_000_000, 256)[-3:] == [128, 192, 256]


def test_the_analysis_is_reproducible():
    loadings = planted([200, 56])
    assert analyse_loadings("x", loadings, np.ones(256, dtype=bool), CONFIG) == analyse_loadings(
        "x", loadings, np.ones(256, dtype=bool), CONFIG
    )
