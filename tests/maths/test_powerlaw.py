import warnings

import numpy as np
import powerlaw
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import zeta

from crosshead.maths.powerlaw import (
    PowerLaw,
    fit_power_law,
    goodness_of_fit,
    likelihood_ratios,
    sample_power_law,
)


def sample(alpha: float, x_min: int, n: int, seed: int = 0):
    return sample_power_law(alpha, x_min, n, np.random.default_rng(seed))


@pytest.mark.parametrize(("alpha", "x_min"), [(1.8, 1), (2.5, 3), (3.5, 8)])
def test_a_planted_exponent_is_recovered(alpha, x_min):
    fit = fit_power_law(sample(alpha, x_min, 20_000))
    assert fit.alpha == pytest.approx(alpha, rel=0.04)
    assert fit.x_min <= 3 * x_min


def test_a_steep_law_is_fitted_at_its_maximum_and_not_at_the_end_of_a_grid():
    sizes = sample(14.0, 60, 4000)
    fit = fit_power_law(sizes)
    tail = sizes[sizes >= fit.x_min]
    exact = minimize_scalar(lambda a: len(tail) * np.log(zeta(a, fit.x_min)) + a * np.log(tail).sum(),
                            bounds=(2, 39), method="bounded", options={"xatol": 1e-8})  # fmt: skip
    assert fit.alpha == pytest.approx(exact.x, rel=1e-3)
    assert fit.alpha == pytest.approx(14.0, rel=0.1)


def test_sizes_that_hardly_vary_have_no_exponent():
    assert fit_power_law(np.array([1000] * 40 + [1001] * 3)) is None


def test_samples_follow_the_law():
    drawn = sample(2.2, 4, 200_000)
    for x in (4, 5, 9, 40):
        assert (drawn >= x).mean() == pytest.approx(zeta(2.2, x) / zeta(2.2, 4), abs=0.005)


def test_the_exponent_maximises_the_exact_likelihood():
    sizes = sample(2.3, 2, 300, seed=3)
    fit = fit_power_law(sizes)
    tail = sizes[sizes >= fit.x_min]
    exact = minimize_scalar(lambda a: len(tail) * np.log(zeta(a, fit.x_min)) + a * np.log(tail).sum(),
                            bounds=(1.05, 6), method="bounded", options={"xatol": 1e-8})  # fmt: skip
    assert fit.alpha == pytest.approx(exact.x, abs=1e-4)


def test_exponent_and_lognormal_ratio_agree_with_the_powerlaw_package():
    sizes = sample(2.1, 3, 400, seed=5)
    fit = fit_power_law(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = powerlaw.Fit(sizes, discrete=True, xmin=fit.x_min, estimate_discrete=False, verbose=False)
        ratio, _ = theirs.distribution_compare("power_law", "exponential")
    assert fit.alpha == pytest.approx(theirs.power_law.alpha, abs=0.02)
    assert likelihood_ratios(sizes, fit)["exponential"].ratio == pytest.approx(ratio, rel=0.05)


def test_p_values_are_large_for_power_laws_and_small_for_others():
    true = [goodness_of_fit(s, fit_power_law(s), bootstraps=40, seed=0)
            for s in (sample(2.4, 2, 250, seed=i) for i in range(6))]  # fmt: skip
    assert np.mean(true) > 0.25
    generator = np.random.default_rng(0)
    poisson = generator.poisson(40, 400) + 1
    fit = fit_power_law(poisson, minimum_tail=200)
    assert goodness_of_fit(poisson, fit, bootstraps=40, seed=0, minimum_tail=200) <= 0.1


def test_rivals_win_on_their_own_samples_and_lose_on_power_laws():
    exponential = np.random.default_rng(1).geometric(0.05, 2000)
    ratios = likelihood_ratios(exponential, PowerLaw(2.0, 1, 0.0, 2000)._replace(alpha=1.4))
    assert ratios["exponential"].ratio < 0
    assert ratios["exponential"].p_value < 0.01
    assert ratios["truncated_power_law"].p_value < 0.01
    pure = sample(2.2, 2, 3000)
    ratios = likelihood_ratios(pure, fit_power_law(pure))
    assert ratios["exponential"].ratio > 0
    assert ratios["exponential"].p_value < 0.01
    assert ratios["truncated_power_law"].p_value > 0.01


def test_a_nested_rival_never_fits_worse():
    for seed in range(4):
        sizes = sample(1.9, 1, 200, seed=seed)
        assert likelihood_ratios(sizes, fit_power_law(sizes))["truncated_power_law"].ratio < 0.05


def test_too_few_or_equal_sizes_have_no_fit_and_zero_is_refused():
    assert fit_power_law(np.array([3, 4, 5])) is None
    assert fit_power_law(np.full(50, 7)) is None
    with pytest.raises(ValueError, match="positive integers, got 0"):
        fit_power_law(np.array([0, 1, 2]))


def test_results_depend_on_the_seed_alone():
    sizes = sample(2.0, 2, 100)
    fit = fit_power_law(sizes)
    assert goodness_of_fit(sizes, fit, bootstraps=10, seed=4) == goodness_of_fit(sizes, fit, bootstraps=10, seed=4)
