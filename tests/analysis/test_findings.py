import copy

import pytest

from crosshead.analysis.findings import ReportConfig, collect
from crosshead.analysis.verdicts import judge
from tests.analysis.records import documents, record

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


def of_penalties(records, factor: float = 1.0):
    """The MTC sweeps again under the other norms of head loadings."""
    again = [r for r in records if r["series"] == "mtc"]
    return [*records, *(
        r | {"series": series, "run": f"{series}-{r['run']}", "evaluation": r["evaluation"] | {
            "normalised_mse": factor * r["evaluation"]["normalised_mse"],
            "context_squared_error": [factor * e for e in r["evaluation"]["context_squared_error"]]}}
        for series in CONFIG.mtc_penalties for r in again)]  # fmt: skip


def superposition(records):
    document = documents((0, 1, 2)) | {"records": records}
    found = judge(collect(**document, profile="test", config=CONFIG, inputs={}), CONFIG)
    return next(f for f in found if f.key == "superposition")


def test_superposition_is_not_supported_without_the_null():
    records = documents((0, 1, 2))["records"]
    assert superposition(of_penalties(records)).reason == "mtc: the one-head null was not run"


def test_an_mtc_that_loses_to_top1_or_has_more_features_decides_nothing():
    lost = superposition(of_penalties(documents((0, 1, 2), top1_factor=0.9)["records"]))
    assert lost.verdict == "inconclusive"
    assert "trained badly" in lost.reason
    larger = [r | {"features": 512} if r["series"] == "mtc" else r for r in documents((0, 1, 2))["records"]]
    assert "different numbers of features" in superposition(of_penalties(larger)).reason


def test_a_coarse_sweep_of_a_convex_curve_is_held_against_the_same_points_of_the_fine_one():
    document = documents()
    document["records"] = [r for r in document["records"] if r["series"] not in ("mtc", "top1")]
    for series, levels in (("mtc", (30, 60, 110, 200)), ("top1", (30, 60, 110, 200)), ("mtc-penalty-l1", (30, 200))):
        document["records"] += [record(series, l0, 5 / l0 + 0.1) for l0 in levels]
    found = collect(**document, profile="test", config=CONFIG, inputs={})["comparisons"]
    assert found["mtc-penalty-l1_over_top1"]["ratio"] == pytest.approx(1.0)
    assert found["mtc_over_top1"]["n_sparsities"] == 4


def test_a_control_of_fewer_coefficients_brings_its_own_two_layers_at_the_same_ones():
    document = documents()
    for row in document["records"]:
        if row["series"].startswith("value-both"):
            row["sparsity_value"] /= 2  # the coefficient of the one-layer SAE whose L0 is half
    coarse = [r for r in document["records"] if r["series"] != "value-both-control" or r["sparsity_value"] in (30, 200)]
    found = collect(**document | {"records": coarse}, profile="test", config=CONFIG, inputs={})["comparisons"]
    assert found["value-both-control_over_sum"]["n_sparsities"] == 2
    assert found["value-both-control_over_sum"]["own"]["n_sparsities"] == 2
    assert found["value-both_over_sum"]["n_sparsities"] == 4
    assert "own" not in metrics()["comparisons"]["value-both-control_over_sum"]


def test_a_two_layer_gap_without_the_matched_controls_stays_inconclusive_and_so_does_its_absence_without_settings():
    assert verdict(metrics((0, 1, 2), both_factor=0.8), "cross-layer") == "inconclusive"
    (found,) = [f for f in judge(metrics((0, 1, 2), both_factor=1.3), CONFIG) if f.key == "cross-layer"]
    assert found.reason == "0 settings of start, rate and length were tried of 6"


def test_an_input_that_is_no_metrics_file_is_refused():
    with pytest.raises(ValueError, match=r"the input 'old' is no metrics\.json of schema"):
        collect(**documents(), profile="test", config=CONFIG, inputs={"old": {"frontier": []}})


@pytest.mark.parametrize("factor", [0.8, 1.2])
def test_a_gap_in_the_control_leaves_the_comparison_undecided(factor):
    document = documents((0, 1, 2), both_factor=1.3)
    for row in document["records"]:
        if row["series"] == "value-both-control":
            row["evaluation"]["context_squared_error"] = [
                factor * error for error in row["evaluation"]["context_squared_error"]
            ]
            row["evaluation"]["normalised_mse"] *= factor
            row["evaluation"]["l1"] *= factor
    found = collect(**document, profile="test", config=CONFIG, inputs={})
    finding = next(f for f in judge(found, CONFIG) if f.key == "cross-layer")
    assert finding.verdict == "inconclusive"
    assert "where no gap may remain" in finding.reason


def test_one_dictionary_never_decides_a_power_law():
    assert verdict(metrics((0, 1, 2), p_value=0.5), "power-law-mtc") == "inconclusive"
    assert verdict(metrics((0, 1, 2), p_value=0.0), "power-law-mtc") == "inconclusive"


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


def test_a_curve_that_ends_beside_a_round_l0_is_read_at_its_end():
    given, end = documents(), 0.0
    for row in given["records"]:
        if row["series"] == "mtc" and row["l0"] == 30:
            row["l0"], end = 30.2, row["normalised_mse"]
        if row["series"] == "top1" and row["l0"] == 30:
            row["l0"] = 31
    found = collect(**given, profile="test", config=CONFIG, inputs={})["matched_l0"][0]
    assert found["l0"] == 30
    assert found["mtc"] == pytest.approx(end)
    assert found["top1"] is None


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
    found["clusters"], found["cluster_features"] = [], {}
    assert {f.key for f in judge(found, CONFIG)} == {"heads-per-feature", "identity", "attention-output"}


def test_a_second_schedule_counts_for_mtc_over_top1_alone():
    def settings(series, mse, end=""):
        return record(series, 60, mse) | {"run": f"{series}-rate200{end}", "learning_rate": 8e-3}

    document = documents()
    document["records"] += [
        settings("mtc-settings", 0.11), settings("mtc-settings", 0.08, "-annealed"), settings("top1-settings", 0.1),
        settings("top1-settings", 0.09, "-annealed"), settings("joint-top1-settings", 0.2) | {"start": None},
    ]  # fmt: skip
    found = collect(**document, profile="test", config=CONFIG, inputs={})["robustness"]
    assert found["mtc_over_top1"]["ratio_range"] == pytest.approx([1.1, 1.1])
    assert found["mtc_over_top1_schedules"]["ratio_range"] == pytest.approx([8 / 9, 8 / 9])
    assert found["top1_over_joint_top1"]["ratio_range"] == pytest.approx([0.5, 0.5])
    assert "mtc_over_best_head" not in found
