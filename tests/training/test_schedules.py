import pytest

from crosshead.training.schedules import learning_rate_factor


def test_the_factor_rises_stays_and_falls():
    factors = [learning_rate_factor(step, 100, 10, 0.2) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.05)


def test_no_warmup_and_no_decay_is_constant():
    assert {learning_rate_factor(step, 50, 0, 0.0) for step in range(50)} == {1.0}
