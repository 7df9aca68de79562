import numpy as np
import pytest

from crosshead.analysis.frontiers import compare_objectives, compare_series, compare_with_sum, sum_points


def record(series: str, l0: float, mse: float, noise: np.ndarray, variance: float = 10.0, seed: int = 0):
    errors = (mse * variance * noise).tolist()
    return {
        "series": series, "l0": l0, "n_tokens": 1000, "seed": seed,
        "evaluation": {"normalised_mse": float(np.sum(errors) / (variance * len(noise))),
                       "context_squared_error": errors, "context_variance": [variance] * len(noise)},
    }  # fmt: skip


NOISE = np.random.default_rng(0).uniform(0.5, 1.5, 40)


def sweep(series: str, factor: float, noise: np.ndarray = NOISE, seed: int = 0):
    return [record(series, l0, factor / l0, noise, seed=seed) for l0 in (10, 20, 40, 80)]


def test_equal_errors_up_to_a_factor_give_that_factor_with_no_spread():
    result = compare_series(sweep("a", 0.9), sweep("b", 1.0))
    assert result.ratio == pytest.approx(0.9)
    assert result.interval == pytest.approx((0.9, 0.9))
    assert result.l0_range == (10, 80)
    assert [row["l0"] for row in result.at] == [10, 20, 30, 40, 60, 80]


def test_independent_context_noise_widens_the_interval_around_one():
    other = np.random.default_rng(1).uniform(0.5, 1.5, 40)
    low, high = compare_series(sweep("a", 1.0), sweep("b", 1.0, other)).interval
    assert high - low > 0.05


def test_seeds_are_compared_one_by_one_and_their_spread_enters_the_interval():
    factors = {0: 0.8, 1: 0.9, 2: 1.0, 3: 0.5}
    first = [r for seed, factor in factors.items() for r in sweep("a", factor, seed=seed)]
    second = [r for seed in (0, 1, 2) for r in sweep("b", 1.0, seed=seed)]
    result = compare_series(first, second)
    assert result.seed_ratios == pytest.approx({"0": 0.8, "1": 0.9, "2": 1.0})
    assert result.ratio == pytest.approx((0.8 * 0.9) ** (1 / 3))
    low, high = result.interval
    assert low == pytest.approx(0.8, abs=0.01)
    assert 0.95 < high <= 1.0
    assert result.n_sparsities == 4
    assert result.at[0]["first"] == pytest.approx(result.at[0]["second"] * result.ratio)


def test_sweeps_without_a_common_seed_are_not_compared():
    result = compare_series(sweep("a", 1.0, seed=0), sweep("b", 1.0, seed=1))
    assert (result.ratio, result.interval, result.at) == (None, None, [])


def test_a_finer_filling_changes_the_sum_by_less_than_two_in_a_thousand(monkeypatch):
    flat = np.ones(8)
    one = [record("one", l0, mse, flat) for l0, mse in ((20, 0.4), (60, 0.25), (120, 0.14), (200, 0.08))]
    both = [record("both", l0, mse, flat) for l0, mse in ((40, 0.4), (130, 0.22), (250, 0.13), (390, 0.08))]
    usual = compare_with_sum(both, one, one).ratio
    monkeypatch.setattr("crosshead.analysis.frontiers._BETWEEN", 400)
    monkeypatch.setattr("crosshead.analysis.frontiers._DRAWS", 1)
    assert compare_with_sum(both, one, one).ratio == pytest.approx(usual, rel=2e-3)


def test_the_sum_adds_l0_and_pools_errors_over_variances():
    flat = np.ones(5)
    points = sum_points([record("a", 10, 0.2, flat)], [record("b", 30, 0.4, flat, variance=30.0)])
    assert points == [(40, pytest.approx((0.2 * 10 + 0.4 * 30) / 40))]


def test_a_two_layer_sweep_equal_to_the_sum_has_ratio_one():
    flat = np.ones(8)
    one = [record("one", l0, 1 / l0, flat) for l0 in (10, 20, 40)]
    both = [record("both", p.l0, p.mse, flat) for p in sum_points(one, one)]
    assert compare_with_sum(both, one, one).ratio == pytest.approx(1.0)


def test_two_identical_sweeps_sum_to_one_sweep_of_twice_the_l0_or_better():
    flat = np.ones(8)
    one = [record("one", l0, 1 / l0, flat) for l0 in (10, 20, 40)]
    doubled = [record("both", 2 * l0, 1 / l0, flat) for l0 in (10, 20, 40)]
    assert compare_with_sum(doubled, one, one).ratio == pytest.approx(1.0, abs=0.01)


def crossing(series: str, ratios: tuple[float, float, float], noise: np.ndarray = NOISE, seed: int = 0):
    """Three points whose middle one lies at the geometric mean of L0; MSE is the ratio over L0."""
    return [record(series, l0, ratio / l0, noise, seed=seed) for l0, ratio in zip((10, 20, 40), ratios, strict=True)]


def test_the_halves_of_the_range_are_compared_by_themselves():
    """The log of the ratio is linear in L0 between the points, so its mean over a half is that of the half's ends."""
    result = compare_series(crossing("a", (0.5, 0.9, 1.6)), crossing("b", (1.0, 1.0, 1.0)))
    low, high = result.parts["low"], result.parts["high"]
    assert low.l0_range == pytest.approx((10, 20))
    assert high.l0_range == pytest.approx((20, 40))
    assert low.ratio == pytest.approx((0.5 * 0.9) ** 0.5)
    assert high.ratio == pytest.approx((0.9 * 1.6) ** 0.5)
    assert low.interval == pytest.approx((low.ratio, low.ratio))
    assert high.interval == pytest.approx((high.ratio, high.ratio))


def test_halves_lie_in_the_range_of_all_seeds_and_are_means_over_them():
    ones = (1.0, 1.0, 1.0)
    first = crossing("a", (0.5, 0.9, 1.6)) + crossing("a", (0.7, 0.8, 0.9), seed=1)
    result = compare_series(first, crossing("b", ones) + crossing("b", ones, seed=1))
    assert result.parts["low"].ratio == pytest.approx((0.5 * 0.9 * 0.7 * 0.8) ** 0.25)
    assert result.parts["high"].ratio == pytest.approx((0.9 * 1.6 * 0.8 * 0.9) ** 0.25)
    low, high = result.parts["high"].interval
    assert low == pytest.approx((0.8 * 0.9) ** 0.5)
    assert high == pytest.approx((0.9 * 1.6) ** 0.5)
    narrower = compare_series(
        sweep("a", 0.9) + crossing("a", ones, seed=1), sweep("b", 1.0) + crossing("b", ones, seed=1)
    )
    assert narrower.l0_range == (10, 40)
    assert narrower.parts["low"].l0_range == pytest.approx((10, 20))
    assert narrower.parts["high"].ratio == pytest.approx(0.9**0.5)


def test_the_interval_of_a_half_knows_only_the_noise_of_that_half():
    noisy, ones = np.random.default_rng(2).uniform(0.5, 1.5, 40), (1.0, 1.0, 1.0)
    first = [*crossing("a", ones)[:2], crossing("a", ones, noisy)[2]]
    result = compare_series(first, crossing("b", ones))
    assert result.parts["low"].interval == pytest.approx((1.0, 1.0))
    low, high = result.parts["high"].interval
    assert high - low > 0.02


def test_a_two_layer_sweep_may_beat_the_sum_in_one_half_only():
    flat = np.ones(8)
    one = [record("one", l0, 1 / l0, flat) for l0 in (10, 20, 40)]
    points = sum_points(one, one)
    middle = (points[0].l0 * points[-1].l0) ** 0.5
    both = [record("both", p.l0, p.mse * (0.8 if p.l0 < middle else 1.0), flat) for p in points]
    parts = compare_with_sum(both, one, one).parts
    assert parts["low"].ratio == pytest.approx(0.8, abs=0.01)
    assert parts["high"].ratio == pytest.approx(1.0, abs=0.01)


def test_sweeps_that_do_not_meet_have_empty_halves():
    far = [record("b", l0, 1 / l0, NOISE) for l0 in (200, 400)]
    parts = compare_series(sweep("a", 1.0), far).parts
    assert {name: (part.ratio, part.interval, part.l0_range) for name, part in parts.items()} == {
        "low": (None, None, None), "high": (None, None, None)
    }  # fmt: skip


def trained(series: str, coefficient: float, error: float, l1: float, seed: int = 0, kind: str = "l1"):
    """Four held-out positions in two contexts."""
    return {
        "series": series, "seed": seed, "n_tokens": 4, "sparsity": {"kind": kind, "coefficient": coefficient},
        "evaluation": {"context_squared_error": [error, 3 * error], "l1": l1},
    }  # fmt: skip


def test_objectives_are_error_plus_penalty_and_add_up_over_the_layers():
    rows = compare_objectives([trained("both", 2.0, 5.0, 4.0)], [trained("a", 2.0, 2.0, 3.0)],
                              [trained("b", 2.0, 4.0, 1.0)])  # fmt: skip
    assert rows == [{"coefficient": 2.0, "seed": 0, "first": 13.0, "second": 14.0, "ratio": 13 / 14}]


def test_objectives_are_compared_at_equal_coefficients_and_seeds_of_l1_runs_only():
    one = [trained("a", 1.0, 2.0, 3.0), trained("a", 2.0, 2.0, 3.0), trained("a", 2.0, 2.0, 3.0, seed=1)]
    both = [trained("both", 2.0, 1.0, 1.0, seed=1), trained("both", 4.0, 1.0, 1.0),
            trained("both", 1.0, 1.0, 1.0, kind="jumprelu")]  # fmt: skip
    assert [(row["coefficient"], row["seed"]) for row in compare_objectives(both, one, one)] == [(2.0, 1)]
