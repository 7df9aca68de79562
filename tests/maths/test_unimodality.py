import numpy as np
import pytest
from scipy.optimize import linprog

from crosshead.maths.unimodality import dip, unimodality


def smallest_distance(sample: np.ndarray) -> float:
    """By linear programming: over every place of the mode, the best G that is convex before and concave after it."""
    x = np.sort(sample)
    n = len(x)
    best = np.inf
    for mode in range(n):  # G may jump at the mode, so it has two values there
        size = n + 2  # G left of or at every point, then G from the right at the mode, then the distance
        rows, bounds = [], []

        def less(coefficients: dict[int, float], bound: float, rows=rows, bounds=bounds, size=size) -> None:
            row = np.zeros(size)
            for i, value in coefficients.items():
                row[i] += value
            rows.append(row)
            bounds.append(bound)

        def place(i: int, side: str, mode=mode) -> int:
            return n if i == mode and side == "right" else i

        for i in range(n):
            left, right = (place(i, "left"), place(i, "right"))
            less({left: 1, n + 1: -1}, i / n)  # G(x-) - F(x-) <= D and so on
            less({left: -1, n + 1: -1}, -i / n)
            less({right: 1, n + 1: -1}, (i + 1) / n)
            less({right: -1, n + 1: -1}, -(i + 1) / n)
            less({left: 1, right: -1}, 0.0)
        for i in range(n - 1):
            less({place(i, "right"): 1, place(i + 1, "left"): -1}, 0.0)
        for i in range(n - 2):
            if not (i + 2 <= mode or i >= mode):
                continue
            sign, side = (1, "left") if i + 2 <= mode else (-1, "right")
            a, b, c = (place(j, side) for j in (i, i + 1, i + 2))
            w = (x[i + 1] - x[i]) / (x[i + 2] - x[i])
            less({b: sign, a: -sign * (1 - w), c: -sign * w}, 0.0)
        cost = np.zeros(size)
        cost[-1] = 1.0
        found = linprog(cost, A_ub=np.array(rows), b_ub=bounds, bounds=[(0, 1)] * size)
        best = min(best, found.fun)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_dip_is_the_smallest_distance_to_a_distribution_with_one_mode(seed):
    generator = np.random.default_rng(seed)
    sample = np.concatenate([generator.normal(size=7), generator.normal(3 * (seed % 3), 0.4, size=6)])
    assert dip(sample) == pytest.approx(smallest_distance(sample), abs=1e-6)


def test_two_far_clumps_have_the_dip_of_a_quarter_and_a_single_one_half_a_step():
    clumps = np.concatenate([np.linspace(0, 1e-6, 50), np.linspace(1, 1 + 1e-6, 50)])
    assert dip(clumps) == pytest.approx(0.25, abs=0.01)
    assert dip(np.linspace(0, 1, 40)) == pytest.approx(1 / 80)


def test_the_dip_knows_no_scale_and_no_direction():
    sample = np.random.default_rng(0).normal(size=200)
    assert dip(-3 * sample + 5) == pytest.approx(dip(sample))


def test_equal_values_have_one_mode():
    assert dip(np.ones(9)) == 0.0
    assert unimodality(np.ones(9)).p_value == 1.0


def test_one_mode_is_kept_and_two_are_told_apart():
    generator = np.random.default_rng(1)
    one = generator.normal(size=300)
    two = np.concatenate([generator.normal(size=150), generator.normal(5, 1, size=150)])
    assert unimodality(one, 100).p_value > 0.2
    assert unimodality(two, 100).p_value == pytest.approx(1 / 101)


def test_uniform_samples_are_rejected_at_the_nominal_rate():
    generator = np.random.default_rng(2)
    p_values = [unimodality(generator.random(40), 999).p_value for _ in range(300)]
    assert 0.01 < np.mean(np.array(p_values) <= 0.05) < 0.12


def test_too_few_values_have_no_test_and_infinity_is_refused():
    assert unimodality(np.array([0.0, 1.0, 2.0])) is None
    with pytest.raises(ValueError, match="finite values"):
        unimodality(np.array([0.0, 1.0, 2.0, np.inf]))
