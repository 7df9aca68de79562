import copy

import pytest

from crosshead.analysis.findings import ReportConfig, collect, judge
from tests.analysis.records import documents

CONFIG = ReportConfig()


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crosshead.analysis.frontiers._DRAWS", 20)
    monkeypatch.setattr("crosshead.analysis.frontiers._BETWEEN", 8)


def metrics(seeds=(0,), top1_factor: float = 1.1, both_factor: float = 0.9, p_value: float = 0.5):
    return collect(**documents(seeds, top1_factor, both_factor, p_value), profile="test", config=CONFIG, inputs={})


def verdict(found, key: str) -> str:
    return next(f.verdict for f in judge(found, CONFIG) if f.key == key)


def test_one_seed_never_decides():
    assert verdict(metrics(), "superposition") == "inconclusive"
    assert verdict(metrics(), "cross-layer") == "inconclusive"


@pytest.mark.parametrize(("factor", "expected"), [(1.1, "supports"), (0.9, "contradicts")])
def test_three_seeds_and_an_interval_on_one_side_decide_superposition(factor, expected):
    assert verdict(metrics((0, 1, 2), top1_factor=factor), "superposition") == expected


def test_a_two_layer_gap_without_the_matched_controls_stays_inconclusive_and_its_absence_contradicts():
    assert verdict(metrics((0, 1, 2), both_factor=0.8), "cross-layer") == "inconclusive"
    assert verdict(metrics((0, 1, 2), both_factor=1.3), "cross-layer") == "contradicts"


def test_a_gap_in_the_control_leaves_the_comparison_undecided():
    document = documents((0, 1, 2), both_factor=1.3)
    for record in document["records"]:
        if record["series"] == "value-both-control":
            record["evaluation"]["context_squared_error"] = [
                0.8 * error for error in record["evaluation"]["context_squared_error"]
            ]
            record["evaluation"]["normalised_mse"] *= 0.8
    found = collect(**document, profile="test", config=CONFIG, inputs={})
    finding = next(f for f in judge(found, CONFIG) if f.key == "cross-layer")
    assert finding.verdict == "inconclusive"
    assert "shows one of its own" in finding.reason


def test_one_dictionary_never_decides_a_power_law():
    assert verdict(metrics((0, 1, 2), p_value=0.5), "power-law-mtc-30") == "inconclusive"
    assert verdict(metrics((0, 1, 2), p_value=0.0), "power-law-mtc-30") == "inconclusive"


@pytest.mark.parametrize(("change", "why"), [
    (lambda records: [r for r in records if r["l0"] != 200], "3 sparsities in a sweep"),
    (lambda records: [r | {"tokens_trained": 5} if r["series"] == "top1" else r for r in records],
     "different numbers of tokens"),
])  # fmt: skip
def test_short_sweeps_and_unequal_budgets_decide_nothing(change, why):
    document = documents((0, 1, 2))
    document["records"] = change(document["records"])
    found = collect(**document, profile="test", config=CONFIG, inputs={})
    finding = next(f for f in judge(found, CONFIG) if f.key == "superposition")
    assert finding.verdict == "inconclusive"
    assert why in finding.reason


def test_the_matched_table_is_log_linear_between_measured_points():
    rows = {row["l0"]: row for row in metrics()["matched_l0"]}
    assert rows[60]["mtc"] == pytest.approx(5 / 60, rel=0.2)
    assert rows[60]["top1"] / rows[60]["mtc"] == pytest.approx(1.1)
    assert rows[60]["linear_top1"] == 0.4
    assert rows[30]["linear_top1"] is None


def test_every_finding_states_sample_size_and_control():
    for finding in judge(metrics(), CONFIG):
        assert finding.control
        assert finding.reason
        assert any(word in finding.figure for word in ("tokens", "features")), finding.key


def test_the_frontier_has_the_documented_fields():
    row = metrics()["frontier"][0]
    documented = {"run", "architecture", "layers", "target", "features", "heads_per_feature", "sparsity", "seed", "l0",
                  "normalised_mse", "ce_recovered", "dead_fraction", "n_tokens"}  # fmt: skip
    assert documented <= row.keys()


def test_claims_without_runs_are_left_out():
    found = copy.deepcopy(metrics())
    found["comparisons"] = {}
    found["clusters"] = []
    assert {f.key for f in judge(found, CONFIG)} == {"heads-per-feature", "identity", "attention-output"}
