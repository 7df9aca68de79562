import math
import random

import pytest

from crosshead.maths.frontier import Point, geometric_mean_ratio, log_interpolate, lower_envelope, overlap

CURVE = [Point(10, 0.4), Point(20, 0.1), Point(40, 0.05)]


def test_interpolation_is_log_linear_and_exact_at_the_points():
    assert log_interpolate(CURVE, 20) == pytest.approx(0.1)
    assert log_interpolate(CURVE, 15) == pytest.approx(math.sqrt(0.4 * 0.1))


def test_nothing_is_extrapolated():
    assert log_interpolate(CURVE, 9.9) is None
    assert log_interpolate(CURVE, 41) is None
    assert log_interpolate([], 5) is None


def test_the_envelope_drops_every_dominated_point():
    points = [*CURVE, Point(15, 0.45), Point(30, 0.2), Point(40, 0.06)]
    assert lower_envelope(points) == CURVE


def test_the_envelope_of_random_points_is_the_brute_force_one():
    generator = random.Random(0)
    for _ in range(20):
        points = [Point(generator.randint(1, 12), generator.randint(1, 12) / 10) for _ in range(30)]
        kept = {p for p in points if not any(
            q.l0 <= p.l0 and q.mse <= p.mse and q != p for q in points)}  # fmt: skip
        assert lower_envelope(points) == sorted(kept)


def test_a_frontier_scaled_by_a_factor_has_that_ratio():
    scaled = [Point(p.l0, 0.9 * p.mse) for p in CURVE]
    assert geometric_mean_ratio(scaled, CURVE) == pytest.approx(0.9)


def test_frontiers_that_do_not_meet_are_not_compared():
    far = [Point(50, 0.1), Point(60, 0.05)]
    assert overlap(CURVE, far) is None
    assert geometric_mean_ratio(CURVE, far) is None


def test_a_part_of_the_range_is_compared_by_itself():
    other = [Point(10, 0.4), Point(20, 0.05), Point(40, 0.05)]
    assert geometric_mean_ratio(CURVE, other, within=(10, 20)) == pytest.approx(2**0.5)
    assert geometric_mean_ratio(CURVE, other, within=(0, 20)) == pytest.approx(2**0.5)
    assert geometric_mean_ratio(CURVE, other, within=(20, 90)) == pytest.approx(2**0.5)
    assert geometric_mean_ratio(CURVE, other, within=(41, 90)) is None
