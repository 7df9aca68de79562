"""Discrete power laws: maximum likelihood, goodness of fit, and rivals (Clauset, Shalizi and Newman 2009).

    p(x) = x^-alpha / zeta(alpha, x_min),  x = x_min, x_min + 1, ...

x_min is the candidate with the smallest Kolmogorov-Smirnov distance between tail and fit. The p-value is the share of
synthetic samples (drawn from the fit above x_min, resampled from the data below it) whose own refitted distance is at
least as large; small means: not a power law. Rivals are compared on the same tail by Vuong's likelihood-ratio test.

The exponent is the exact discrete likelihood's, on a grid refined by a parabola: the usual closed-form approximation is
off by a tenth at the small x_min that cluster sizes have. An x_min whose likelihood still rises at the end of the grid
(alpha 40: sizes that hardly vary) has no exponent and is no candidate.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import zeta
from scipy.stats import norm

__all__ = ["LikelihoodRatio", "PowerLaw", "fit_power_law", "goodness_of_fit", "likelihood_ratios", "sample_power_law"]

Sizes = NDArray[np.int64]
_LOG_EXCESS = np.linspace(np.log(0.02), np.log(39.0), 400)
"""log(alpha - 1) on the grid: its steps are 2% of alpha - 1 everywhere."""
_ALPHAS = 1.0 + np.exp(_LOG_EXCESS)
_MINIMUM_TAIL = 10


class PowerLaw(NamedTuple):
    """A fitted discrete power law."""

    alpha: float
    x_min: int
    ks: float
    """Largest distance between the tail's distribution and the fit's."""
    n_tail: int
    """Observations at or above x_min."""


class LikelihoodRatio(NamedTuple):
    """Power law against a rival on the same tail."""

    ratio: float
    """Log-likelihood of the power law minus the rival's; above 0 favours the power law."""
    p_value: float
    """Two-sided, that the sign is chance (Vuong); for the nested truncated power law by the chi-square test."""


@lru_cache(maxsize=4096)
def _log_zeta(x_min: int) -> NDArray[np.float64]:
    return np.log(zeta(_ALPHAS, x_min))


def fit_power_law(sizes: Sizes, minimum_tail: int = _MINIMUM_TAIL) -> PowerLaw | None:
    """Fit sizes (positive integers). None when no x_min leaves ``minimum_tail`` observations that admit one."""
    values = np.sort(np.asarray(sizes, dtype=np.int64))
    if len(values) and values[0] < 1:
        raise ValueError(f"sizes must be positive integers, got {values[0]}")
    best: PowerLaw | None = None
    for x_min in np.unique(values)[:-1]:
        tail = values[np.searchsorted(values, x_min) :]
        if len(tail) < minimum_tail:
            break
        alpha = _alpha(tail, int(x_min))
        if alpha is None:
            continue
        ks = _ks_distance(tail, alpha, int(x_min))
        if best is None or ks < best.ks:
            best = PowerLaw(alpha, int(x_min), ks, len(tail))
    return best


def _alpha(tail: Sizes, x_min: int) -> float | None:
    """Maximum of the likelihood; None where it lies at an end of the grid."""
    likelihood = -len(tail) * _log_zeta(x_min) - _ALPHAS * np.log(tail).sum()
    i = int(likelihood.argmax())
    if i in (0, len(_ALPHAS) - 1):
        return None
    left, middle, right = likelihood[i - 1 : i + 2]
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature < 0 else 0.0
    return float(1.0 + np.exp(_LOG_EXCESS[i] + shift * (_LOG_EXCESS[1] - _LOG_EXCESS[0])))


def _ks_distance(tail: Sizes, alpha: float, x_min: int) -> float:
    unique, counts = np.unique(tail, return_counts=True)
    empirical = counts.cumsum() / len(tail)
    fitted = 1.0 - zeta(alpha, unique + 1) / zeta(alpha, x_min)
    before = np.concatenate([[0.0], empirical[:-1]])
    fitted_before = 1.0 - zeta(alpha, unique) / zeta(alpha, x_min)
    return float(max(np.abs(empirical - fitted).max(), np.abs(before - fitted_before).max()))


def sample_power_law(alpha: float, x_min: int, n: int, generator: np.random.Generator) -> Sizes:
    """Draw n sizes: exact by inversion up to 10,000 above x_min, by the continuous approximation beyond."""
    u = generator.random(n)
    table = np.arange(x_min, x_min + 10_000)
    survival = zeta(alpha, table) / zeta(alpha, x_min)  # P(X >= x)
    drawn = table[np.searchsorted(-survival, -u, side="right") - 1]
    far = u < survival[-1]
    scale = (u[far] / survival[-1]) ** (-1.0 / (alpha - 1.0))
    drawn[far] = np.minimum(np.floor((table[-1] - 0.5) * scale + 0.5), 2**53).astype(np.int64)
    return drawn


def goodness_of_fit(
    sizes: Sizes, fit: PowerLaw, *, bootstraps: int, seed: int, minimum_tail: int = _MINIMUM_TAIL
) -> float:
    """Share of semi-parametric synthetic samples, refitted with their own x_min, that are at least as far off.

    ``minimum_tail`` is the one that ``fit`` was made with. Samples that admit no fit (a few equal sizes) are left out.
    """
    values = np.asarray(sizes, dtype=np.int64)
    below = values[values < fit.x_min]
    generator = np.random.default_rng(seed)
    as_far = n_fitted = 0
    for _ in range(bootstraps):
        n_tail = generator.binomial(len(values), fit.n_tail / len(values)) if len(below) else len(values)
        tail = sample_power_law(fit.alpha, fit.x_min, n_tail, generator)
        rest = generator.choice(below, len(values) - n_tail) if len(below) else below
        synthetic = fit_power_law(np.concatenate([tail, rest]), minimum_tail)
        if synthetic is not None:
            n_fitted += 1
            as_far += synthetic.ks >= fit.ks
    return as_far / max(n_fitted, 1)


def likelihood_ratios(sizes: Sizes, fit: PowerLaw) -> dict[str, LikelihoodRatio]:
    """The fitted power law against lognormal, exponential and truncated power law on its own tail."""
    values = np.asarray(sizes, dtype=np.int64)
    tail = values[values >= fit.x_min].astype(float)
    own = -fit.alpha * np.log(tail) - np.log(zeta(fit.alpha, fit.x_min))
    support = _Support(fit.x_min)
    results = {}
    for name, (log_weight, starts) in _RIVALS.items():
        rival = _rival_log_likelihood(tail, support, log_weight, starts(tail, fit))
        difference = own - rival
        total = float(difference.sum())
        if name == "truncated_power_law":
            # Nested: twice the gain of the larger model is chi-square with one degree of freedom (boundary: halved).
            p_value = float(2 * norm.sf(np.sqrt(2 * max(-total, 0.0)))) / 2
        else:
            spread = float(difference.std()) * np.sqrt(len(tail))
            p_value = float(2 * norm.sf(abs(total) / spread)) if spread > 0 else 1.0
        results[name] = LikelihoodRatio(total, p_value)
    return results


class _Support:
    """The integers from x_min on: one by one at first, then in bins that grow by a hundredth."""

    def __init__(self, x_min: int):
        fine = np.arange(x_min, x_min + 2_000, dtype=float)
        edges = np.unique(np.floor(np.geomspace(fine[-1] + 1, 1e9, 1_500)))
        self.x = np.concatenate([fine, np.sqrt(edges[:-1] * (edges[1:] - 1))])
        self.log_count = np.log(np.concatenate([np.ones_like(fine), np.diff(edges)]))


LogWeight = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


def _rival_log_likelihood(
    tail: NDArray[np.float64], support: _Support, log_weight: LogWeight, starts: list[list[float]]
) -> NDArray[np.float64]:
    """Log-likelihood of every observation at the rival's maximum."""

    def each(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        terms = log_weight(support.x, parameters) + support.log_count
        peak = terms.max()
        return log_weight(tail, parameters) - (peak + np.log(np.exp(terms - peak).sum()))

    fits = [
        minimize(lambda p: -each(p).sum(), start, method="Nelder-Mead", options={"maxiter": 300}) for start in starts
    ]
    return each(min(fits, key=lambda f: f.fun).x)


def _lognormal(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.log(x) - 0.5 * ((np.log(x) - p[0]) / np.exp(p[1])) ** 2


def _exponential(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.exp(p[0]) * x


def _truncated(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return -p[0] * np.log(x) - np.exp(p[1]) * x


_RIVALS: dict[str, tuple[LogWeight, Callable[[NDArray[np.float64], PowerLaw], list[list[float]]]]] = {
    "lognormal": (_lognormal, lambda t, f: [[float(np.log(t).mean()), float(np.log(np.log(t).std() + 0.1))]]),
    "exponential": (_exponential, lambda t, f: [[-float(np.log(t.mean() - f.x_min + 1.0))]]),
    "truncated_power_law": (_truncated, lambda t, f: [[f.alpha, -12.0], [1.0, -float(np.log(t.mean()))]]),
}
