import numpy as np
import pytest

from crosshead.analysis.robustness import (
    compare_objective_settings,
    compare_settings,
    meaning_at_settings,
    unsettled,
    unsettled_where,
)
from tests.analysis.records import record


def run(
    series: str,
    l0: float,
    mse: float,
    seed: int = 0,
    start: str | None = "value_maps",
    rate: float = 4e-3,
    steps: int = 500,
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


def test_of_two_schedules_at_one_setting_the_better_counts_on_either_side():
    first = [run("mtc", 60, 0.11), run("mtc", 60, 0.09)]
    second = [run("top1", 60, 0.10), run("top1", 60, 0.12)]
    assert compare_settings(first, second).settings[0].ratio == pytest.approx(0.9)


def test_an_architecture_with_one_start_is_held_against_every_start_of_the_other():
    first = [run("mtc", 60, 0.1 * factor, start=start) for start, factor in (("random", 0.9), ("value_maps", 0.8))]
    second = [run("joint", 60, 0.1, start=None), run("joint", 60, 0.1, start=None, rate=1e-3)]
    found = compare_settings(first, second)
    assert {s.start: s.ratio for s in found.settings} == pytest.approx({"random": 0.9, "value_maps": 0.8})
    assert found.unpaired == 2, "the other rate, at either start"
    alone = compare_settings([run("sae", 60, 0.05, start=None)], second[:1])
    assert [(s.start, s.ratio) for s in alone.settings] == [(None, pytest.approx(0.5))]


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="runs of series mtc have 128 to 512 features"):
        compare_settings([run("mtc", 60, 0.1), run("mtc-wide", 60, 0.08) | {"features": 512}], [run("top1", 60, 0.1)])


def test_objectives_of_two_layers_are_compared_with_the_sum_at_every_setting():
    def value(series: str, mse: float, rate: float):
        return run(series, 60, mse, start=None, rate=rate) | {"sparsity": {"kind": "l1", "coefficient": 2.0}}

    both = [value("both", 0.8 * mse, rate) for mse, rate in ((0.2, 1e-3), (0.1, 2e-3))]
    ones = [[value(series, mse, rate) for mse, rate in ((0.2, 1e-3), (0.1, 2e-3), (0.3, 4e-3))] for series in "ab"]
    found = compare_objective_settings(both, *ones)
    for setting, alike in zip(found.settings, zip(both, *ones, strict=False), strict=True):
        joint, *apart = (sum(r["evaluation"]["context_squared_error"]) / r["n_tokens"] + 2.0 * r["evaluation"]["l1"]
                         for r in alike)  # fmt: skip
        assert setting.ratio == pytest.approx(joint / sum(apart))
        assert (setting.matched, setting.interval, setting.l0) == ("coefficient", None, (60.0, 120.0))
    assert found.unpaired == 1


def settled(verdict: str, *intervals: tuple[float, float], n_settings: int = 2, unpaired: int = 0):
    settings = [{"matched": "sparsity", "ratio": sum(interval) / 2, "interval": interval} for interval in intervals]
    return unsettled(verdict, {"settings": settings, "unpaired": unpaired}, n_settings)


def test_a_verdict_is_settled_only_where_every_setting_has_its_sign():
    below, above, across = (0.8, 0.9), (1.1, 1.2), (0.9, 1.1)
    assert settled("supports", below, below) is None
    assert settled("contradicts", above, above) is None
    for verdict, intervals in (("supports", (below, across)), ("supports", (below, above)),
                               ("contradicts", (above, across)), ("supports", (below,))):  # fmt: skip
        assert settled(verdict, *intervals).verdict == "inconclusive"
    assert settled("supports", below, below, unpaired=1) is not None
    assert unsettled("supports", None, 1) is not None
    objectives = {"settings": [{"matched": "coefficient", "ratio": 0.99, "interval": None}], "unpaired": 0}
    assert unsettled("supports", objectives, 1) is None
    assert unsettled("contradicts", objectives, 1) is not None


def test_what_holds_at_each_setting_alone_must_hold_at_all():
    assert unsettled_where([True] * 3, 3) is None
    assert unsettled_where([True] * 2, 3).reason == "2 settings of start, rate and length were tried of 3"
    assert unsettled_where([True, True, False], 3).reason == "holds at 2 of 3 settings of start, rate and length"


def test_meaning_at_settings_is_paired_setting_by_setting():
    """Three starts of one architecture; the other has one start and no run at the third rate."""
    starts, rates = ("energy", "maps", "random"), (1e-3, 2e-3, 4e-3)
    rows = [run("mtc-settings", 60, 0.1, start=start, rate=rate) for start in starts for rate in rates]
    rows += [run("joint-settings", 60, 0.1, start=None, rate=rate) for rate in rates[:2]]
    rows = [row | {"run": f"run-{i}"} for i, row in enumerate(rows)]
    metrics = {"frontier": rows, "meaning": {"settings": {row["run"]: {"of": row["run"]} for row in rows}}}
    assert [own["of"] for (own,) in meaning_at_settings(metrics, "mtc")] == [f"run-{i}" for i in range(9)]
    pairs = meaning_at_settings(metrics, "mtc", "joint")
    assert [(a["of"], b["of"]) for a, b in pairs] == [
        (f"run-{3 * start + rate}", f"run-{9 + rate}") for start in range(3) for rate in range(2)
    ]
    assert meaning_at_settings(metrics | {"meaning": None}, "mtc") == []
    twice = rows[0] | {"run": "another", "seed": 1}
    metrics["frontier"].append(twice)
    metrics["meaning"]["settings"]["another"] = {}
    with pytest.raises(
        ValueError, match=r"names two runs of mtc-settings with start energy, rate 0\.001 and 500 steps"
    ):
        meaning_at_settings(metrics, "mtc")
    assert meaning_at_settings(metrics, "absent") == []
