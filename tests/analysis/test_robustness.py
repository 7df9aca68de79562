import numpy as np
import pytest

from crosshead.analysis.robustness import compare_settings
from tests.analysis.records import record


def run(
    series: str, l0: float, mse: float, seed: int = 0, start: str = "value_maps", rate: float = 4e-3, steps: int = 500
):
    return record(series, l0, mse, seed, start=start, learning_rate=rate, steps=steps)


def test_each_setting_is_compared_with_itself_and_its_closed_form_ratio_found():
    ratios = {("value_maps", 4e-3, 500): 0.97, ("value_maps", 1e-3, 500): 0.95, ("random", 4e-3, 1000): 0.99}
    first = [run("mtc", l0, ratio * 5 / l0, start=start, rate=rate, steps=steps)
             for (start, rate, steps), ratio in ratios.items() for l0 in (30, 60, 120)]  # fmt: skip
    second = [run("top1", l0, 5 / l0, start=start, rate=rate, steps=steps)
              for start, rate, steps in ratios for l0 in (30, 60, 120)]  # fmt: skip
    found = compare_settings(first, second)
    assert {(s.start, s.learning_rate, s.steps): s.ratio for s in found.settings} == pytest.approx(ratios)
    assert [(s.start, s.learning_rate) for s in found.settings] == [("random", 4e-3), ("value_maps", 1e-3),
                                                                     ("value_maps", 4e-3)]  # fmt: skip
    assert all(s.matched == "l0" and s.n_sparsities == 3 and s.seeds == [0] for s in found.settings)
    assert found.ratio_range == pytest.approx((0.95, 0.99))
    assert found.same_sign is True
    assert found.unpaired == 0


def test_single_runs_are_matched_by_sparsity_and_seed_and_say_how_l0_differs():
    first = [run("mtc-lr", 60, 0.96 * factor, seed, rate=1e-3) for seed, factor in ((0, 0.1), (1, 0.2))]
    second = [run("top1-lr", 60, 0.1, 0, rate=1e-3) | {"l0": 61.0}, run("top1-lr", 60, 0.2, 1, rate=1e-3)]
    (setting,) = compare_settings(first, second).settings
    assert setting.matched == "sparsity"
    assert setting.ratio == pytest.approx(0.96)
    assert setting.interval == pytest.approx((0.96, 0.96))
    assert setting.l0 == (60.0, 60.5)
    assert (setting.n_sparsities, setting.seeds) == (1, [0, 1])


def test_seeds_and_contexts_enter_the_interval_of_single_runs():
    first = [run("mtc", 60, 0.09, 0), run("mtc", 60, 0.11, 1)]
    second = [run("top1", 60, 0.1, seed) for seed in (0, 1)]
    low, high = compare_settings(first, second).settings[0].interval
    assert (low, high) == pytest.approx((0.9, 1.1))
    noisy = run("mtc", 60, 0.09)
    errors = np.random.default_rng(0).permutation(noisy["evaluation"]["context_squared_error"]).tolist()
    noisy["evaluation"] = noisy["evaluation"] | {"context_squared_error": errors}
    (setting,) = compare_settings([noisy], second[:1]).settings
    low, high = setting.interval
    assert low < setting.ratio < high


@pytest.mark.parametrize(
    ("ratios", "expected"), [((0.9, 1.05), False), ((1.2, 1.05), True), ((0.9,), None), ((), None)]
)
def test_a_sign_that_changes_with_the_setting_is_told(ratios: tuple[float, ...], expected: bool | None):
    rates = [1e-3 * (i + 1) for i in range(len(ratios))]
    first = [run("mtc", 60, 0.1 * ratio, rate=rate) for ratio, rate in zip(ratios, rates, strict=True)]
    found = compare_settings(first, [run("top1", 60, 0.1, rate=rate) for rate in rates])
    assert found.same_sign is expected
    assert found.ratio_range == (pytest.approx((min(ratios), max(ratios))) if ratios else None)


def test_settings_of_one_side_only_and_runs_without_a_partner_are_counted():
    first = [run("mtc", 60, 0.1), run("mtc", 60, 0.1, rate=1e-3), run("mtc", 60, 0.1, steps=900)]
    second = [run("top1", 60, 0.1), run("top1", 30, 0.2, rate=1e-3), run("top1", 60, 0.1, start="random")]
    found = compare_settings(first, second)
    assert len(found.settings) == 1
    assert found.unpaired == 3


def test_runs_that_differ_in_something_else_are_refused():
    twice = [run("mtc", 60, 0.1), run("mtc-wide", 60, 0.08)]
    with pytest.raises(
        ValueError, match="runs mtc-60 and mtc-wide-60 share start, learning rate, steps, sparsity and seed"
    ):
        compare_settings(twice, [run("top1", 60, 0.1)])
