"""Every rule is met once and flipped once by the number it hangs on."""

from typing import Any

import pytest

from crosshead.analysis.claims.attention_output import decide_heads, decide_labels
from crosshead.analysis.claims.clusters import decide_dimensions, decide_power_law, decide_semantic
from crosshead.analysis.claims.coupling import _matched_text, decide_best_head, decide_joint
from crosshead.analysis.claims.interpretability import decide_interpretability
from crosshead.analysis.claims.layers import decide_layers
from crosshead.analysis.claims.superposition import _nulls, decide_superposition
from crosshead.analysis.findings import ReportConfig, collect
from crosshead.analysis.rules import both_regimes, decide
from crosshead.analysis.verdicts import judge
from tests.analysis.records import documents, evidence, meant, record

CONFIG = ReportConfig()


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crosshead.analysis.frontiers._DRAWS", 20)
    monkeypatch.setattr("crosshead.analysis.frontiers._BETWEEN", 8)


def ratio(low: float, high: float, **other):
    part = {"ratio": (low + high) / 2, "interval": [low, high], "l0_range": [10, 100]}
    return part | {"n_seeds": 3, "n_sparsities": 4, "equal_tokens": True, "features": [[8], [8]], "n_tokens": 100,
                   "n_contexts": 4, "objective": [], "parts": {"low": part, "high": part}} | other  # fmt: skip


@pytest.mark.parametrize(("comparison", "verdict"), [
    (ratio(0.8, 0.9), "supports"),
    (ratio(1.1, 1.2), "contradicts"),
    (ratio(0.9, 1.1), "inconclusive"),
    (ratio(0.8, 0.9, n_seeds=2), "inconclusive"),
    (ratio(0.8, 0.9, n_sparsities=3), "inconclusive"),
    (ratio(0.8, 0.9, equal_tokens=False), "inconclusive"),
    (ratio(0.8, 0.9, interval=None), "inconclusive"),
    (None, "inconclusive"),
])  # fmt: skip
def test_a_ratio_decides_with_its_whole_interval_and_enough_runs(comparison, verdict):
    assert decide(comparison).verdict == verdict


AHEAD = {"matched": "sparsity", "ratio": 0.9, "interval": [0.84, 0.96]}
ROBUST = {"settings": [AHEAD] * 18, "unpaired": 0, "ratio_range": [0.85, 0.95]}
UNROBUST = ROBUST | {"settings": [row | {"interval": [1.05, 1.1]} for row in ROBUST["settings"]]}


def superposed(mtc=None, norms=None, null=None, robust=ROBUST, least=0.98, **nulls):
    two, beaten = ratio(0.85, 0.92, n_sparsities=2), ratio(0.97, 1.0, above_noise=[0.95, 1.0])
    nulls = {"mtc": beaten if null is None else null, "l1": beaten, "l2": beaten} | nulls
    found = decide_superposition(mtc or ratio(0.85, 0.9), norms or {"l1": two, "l2": two}, nulls, robust, "mtc", least)
    return found.verdict


def test_superposition_needs_the_null_every_norm_and_every_setting():
    assert superposed() == "supports"
    assert superposed(null=ratio(0.88, 0.93, above_noise=[0.95, 1.0])) == "inconclusive"
    assert superposed(null=ratio(0.7, 0.95, above_noise=[0.95, 1.0])) == "inconclusive"
    assert superposed(null=ratio(0.7, 0.8, above_noise=[0.7, 0.8])) == "contradicts"
    assert superposed(null=ratio(0.97, 1.0, n_seeds=1, above_noise=[0.95, 1.0])) == "inconclusive"
    assert superposed(null=ratio(0.97, 1.0, above_noise=[0.9, 0.96])) == "inconclusive", "0.98 of 0.9 is below 0.9"
    assert superposed(null=ratio(0.97, 1.0, above_noise=None)) == "inconclusive"
    assert superposed(l2=ratio(0.88, 0.95, above_noise=[0.95, 1.0])) == "inconclusive"
    assert superposed(mtc=ratio(0.85, 0.9, own=ratio(0.9, 0.98))) == "inconclusive", "at the null's sparsities"
    assert superposed(mtc=ratio(1.1, 1.2)) == "inconclusive"
    assert superposed(mtc=ratio(0.85, 0.9, features=[[8], [16]])) == "inconclusive"
    assert superposed(norms={"l1": ratio(0.85, 0.92), "l2": None}) == "inconclusive"
    assert superposed(norms={"l1": ratio(0.95, 1.02), "l2": ratio(0.85, 0.92)}) == "inconclusive"
    assert superposed(robust=None) == "inconclusive"
    assert superposed(robust=ROBUST | {"settings": ROBUST["settings"][:6]}) == "inconclusive"
    uneven = [*ROBUST["settings"][:17], {"matched": "sparsity", "ratio": 1.0, "interval": [0.98, 1.01]}]
    assert superposed(robust=ROBUST | {"settings": uneven}) == "inconclusive"
    assert superposed(least=0.96) == "inconclusive", "of the norms' 0.95 as well: 0.912 is below 0.92"
    assert superposed(least=None) == "inconclusive"
    steep = superposed(mtc=ratio(0.5, 0.6), least=0.9, null=ratio(0.97, 1.0, above_noise=[0.9, 1.0]))
    assert steep == "inconclusive", "the norms are not below what planted layers reach"
    missing = decide_superposition(ratio(0.85, 0.9), {}, {}, ROBUST, "mtc", 1.0)
    assert missing.reason == "mtc: the one-head null was not run"


def at(*ratios: float):
    """Objective ratios at the coefficients 1, 2, ..."""
    return [{"coefficient": float(i), "seed": 0, "ratio": each} for i, each in enumerate(ratios, 1)]


def of_layers(comparison, **changes):
    """The verdict with controls whose objectives are 1.0, 0.97 and 0.95."""
    controls = {
        "other contexts": ratio(0.8, 0.9, objective=at(1.0)),
        "matched tokens": ratio(0.97, 0.99, objective=at(0.97)),
        "shared input": ratio(0.92, 0.95, objective=at(0.95)),
    }
    shares = {"pair": 0.5, "token": changes.pop("token", 0.4)}
    settings = [at_settings(changes.pop(name, least)) for name, least in (("settings", 0.9), ("plain_settings", 0.99))]
    controls |= {name.replace("_", " "): value for name, value in changes.items()}
    return decide_layers(comparison, controls, [{"control_detail": shares}], *settings)


def at_settings(ratio: float | None, n_settings: int = 6):
    """Objectives at settings of rate and length, all alike."""
    row = {"matched": "coefficient", "ratio": ratio, "interval": None, "steps": 60}
    rows = [row | {"learning_rate": float(i)} for i in range(n_settings)]
    return None if ratio is None else {"settings": rows, "unpaired": 0, "ratio_range": [ratio, ratio]}


def test_layers_need_a_gap_that_beats_every_control():
    gap = at(0.9)
    assert of_layers(ratio(0.85, 0.9, objective=gap)).verdict == "supports"
    assert "(iii)" in of_layers(ratio(0.85, 0.93, objective=gap)).reason
    assert "(iii)" in of_layers(ratio(0.85, 0.9, objective=at(0.96))).reason
    beaten = ratio(0.86, 0.9, objective=at(0.97))
    assert "(ii)" in of_layers(ratio(0.85, 0.9, objective=gap), matched_tokens=beaten).reason
    assert "no gap" in of_layers(ratio(0.85, 0.9, objective=at(0.99))).reason
    assert "matches a token at 60%" in of_layers(ratio(0.85, 0.9, objective=gap), token=0.1).reason
    assert of_layers(ratio(0.85, 0.9, objective=gap), shared_input=None).verdict == "inconclusive"
    one_seed = ratio(0.97, 0.99, n_seeds=1, objective=at(0.97))
    assert "1 seed of control (ii)" in of_layers(ratio(0.85, 0.9, objective=gap), matched_tokens=one_seed).reason
    own_gap = ratio(0.8, 0.9, objective=at(0.91))
    assert "no gap at coefficient 1" in of_layers(ratio(0.85, 0.9, objective=gap), other_contexts=own_gap).reason
    assert "0 settings" in of_layers(ratio(0.85, 0.9, objective=gap), settings=None).reason
    assert "holds at 0 of 6" in of_layers(ratio(0.85, 0.9, objective=gap), settings=1.01).reason
    assert "not below control (i)" in of_layers(ratio(0.85, 0.9, objective=gap), plain_settings=0.89).reason
    assert "not below control (i)" in of_layers(ratio(0.85, 0.9, objective=gap), plain_settings=None).reason
    assert of_layers(ratio(1.1, 1.2, objective=gap), settings=1.1).verdict == "contradicts"
    assert of_layers(ratio(1.1, 1.2, objective=gap)).reason.startswith("holds at 0 of 6 settings")
    far = of_layers(ratio(1.1, 1.2, objective=gap), other_contexts=ratio(0.8, 0.9, objective=at(1.05)))
    assert "where no gap may remain" in far.reason
    coarse = ratio(0.92, 0.95, objective=at(0.95)) | {"own": ratio(0.93, 0.96, objective=gap)}
    assert "(iii)" in of_layers(ratio(0.85, 0.9, objective=gap), shared_input=coarse).reason, "at equal coefficients"


def test_a_gap_that_a_shared_input_gives_as_well_is_called_so_whatever_else_is_missing():
    lone = ratio(0.85, 0.93, n_seeds=1, objective=at(0.9))
    assert of_layers(lone).reason == (
        "1 seed; the rule asks for 3; the gap does not beat control (iii): shared input"
    )  # fmt: skip
    assert "shared input" not in of_layers(ratio(0.85, 0.9, n_seeds=1, objective=at(0.9))).reason
    assert "shared input" not in of_layers(ratio(1.01, 1.1, n_seeds=1, objective=at(1.1))).reason, "no gap at all"
    no_penalty = of_layers(ratio(0.85, 0.9, objective=at(0.9)), shared_input=ratio(0.92, 0.95))
    assert no_penalty == ("inconclusive", "control (iii) has no L1 runs"), "unknown, not shared input"


def test_control_ii_must_be_known_to_match():
    controls = {
        "other contexts": ratio(0.8, 0.9, objective=at(1.0)),
        "matched tokens": ratio(0.97, 0.99, objective=at(0.97)),
        "shared input": ratio(0.92, 0.95, objective=at(0.95)),
    }
    for matched in ([], [{"control_detail": None}]):
        found = decide_layers(
            ratio(0.85, 0.9, objective=at(0.9)), controls, matched, at_settings(0.9), at_settings(0.99)
        )
        assert "not known" in found.reason


def test_a_gap_at_one_coefficient_does_not_make_up_for_another():
    plain = ratio(0.8, 0.9, objective=at(1.08, 0.95))
    others = {"matched_tokens": ratio(0.97, 0.99, objective=at(1.09, 1.0)),
              "shared_input": ratio(0.97, 0.99, objective=at(1.09, 1.0))}  # fmt: skip
    alike = of_layers(ratio(0.85, 0.9, objective=at(1.03, 0.85)), other_contexts=plain, **others)
    assert alike.verdict == "inconclusive"
    assert "coefficient 1" in alike.reason
    both = of_layers(ratio(0.85, 0.9, objective=at(0.95, 0.9)), other_contexts=plain, **others)
    assert both.verdict == "supports"
    assert of_layers(ratio(0.85, 0.9, objective=at(0.9)), other_contexts=plain, **others).verdict == "inconclusive"


def test_joint_training_must_lose_at_low_and_at_high_l0_with_all_heads_and_at_every_setting():
    full = ratio(0.85, 0.9, n_sparsities=2)
    mixed = ratio(0.85, 0.9, parts={"low": ratio(1.05, 1.1), "high": ratio(0.8, 0.85)})
    assert decide_joint(ratio(0.85, 0.9), full, ROBUST).verdict == "supports"
    assert decide_joint(mixed, full, ROBUST).verdict == "inconclusive"
    assert "not at low" in both_regimes(mixed).reason
    assert decide_joint(ratio(0.85, 0.9), ratio(0.95, 1.05), ROBUST).verdict == "inconclusive"
    assert decide_joint(ratio(0.85, 0.9), None, ROBUST).verdict == "inconclusive"
    assert decide_joint(ratio(0.85, 0.9), full, None).verdict == "inconclusive"
    assert decide_joint(ratio(1.1, 1.2), ratio(1.1, 1.2), UNROBUST).verdict == "contradicts"
    assert decide_joint(ratio(1.1, 1.2), ratio(1.1, 1.2), ROBUST).verdict == "inconclusive"


def test_the_best_head_must_lose_at_every_setting():
    assert decide_best_head(ratio(0.3, 0.4), ROBUST).verdict == "supports"
    assert decide_best_head(ratio(0.3, 0.4), None).verdict == "inconclusive"
    assert decide_best_head(ratio(0.3, 0.4), UNROBUST).reason.startswith("holds at 0 of 18 settings")
    assert decide_best_head(ratio(1.1, 1.2), UNROBUST).verdict == "contradicts"
    assert decide_best_head(ratio(0.9, 1.1), ROBUST).verdict == "inconclusive"


def test_interpretability_needs_separated_intervals_on_both_sides_at_every_seed():
    clear = [(meant(0.5, 0.6, seed), meant(0.3, 0.4, seed)) for seed in range(3)]
    turned = [(b, a) for a, b in clear]
    at = [(meant(0.3, 0.9, 0), meant(0.2, 0.8, 0))] * 18
    against = [(b, a) for a, b in at]
    assert decide_interpretability(clear, at).verdict == "supports"
    assert decide_interpretability(turned, against).verdict == "contradicts"
    assert decide_interpretability(clear[:2], at).verdict == "inconclusive"
    unclear = [*clear[:2], (meant(0.3, 0.5, 2), meant(0.4, 0.6, 2))]
    assert decide_interpretability(unclear, at).verdict == "inconclusive"
    half = meant(0.5, 0.6, 2)
    half["predictability"] = half["predictability"] | {"to": None}
    assert decide_interpretability([*clear[:2], (half, clear[2][1])], at).reason == "one side was not measured"

    mixed = (meant(0.3, 0.9, 0), meant(0.2, 0.8, 0))
    mixed[1]["predictability"] = mixed[1]["predictability"] | {"to": meant(0.4, 1.0, 0)["predictability"]["to"]}
    equal = (at[0][0], at[0][0])
    for settings in (
        at[:17],
        [*at[:17], against[0]],
        [*at[:17], mixed],
        [*at[:17], equal],
        [*at[:17], (half, at[0][1])],
    ):
        assert decide_interpretability(clear, settings).verdict == "inconclusive"
    assert decide_interpretability(turned, [*against[:17], at[0]]).verdict == "inconclusive"


def test_clusters_need_more_enrichment_of_content_than_shuffled_labels_give():
    clear = [(seed, {"content_discoveries": 12, "content_expected_under_shuffle": 0.5}) for seed in range(3)]
    none = [(seed, {"content_discoveries": 1, "content_expected_under_shuffle": 0.5}) for seed in range(3)]
    many, few = ([own] * 18 for own in (clear[0][1], none[0][1]))
    assert decide_semantic(clear, many).verdict == "supports"
    assert decide_semantic([*clear[:2], none[2]], many).verdict == "inconclusive"
    assert decide_semantic(none, few).verdict == "contradicts"
    assert decide_semantic(clear[:2], many).verdict == "inconclusive"
    for settings in (many[:17], [*many[:17], few[0]], [*many[:17], None]):
        assert decide_semantic(clear, settings).verdict == "inconclusive"
    assert decide_semantic(none, [*few[:17], many[0]]).verdict == "inconclusive"


def test_one_mode_must_stand_or_fall_at_every_seed_with_power():
    def tests(*values, power=0.9):
        return [(seed, {"p_value": p, "power": power}) for seed, p in enumerate(values)]

    one, two = ([{"p_value": p}] * 18 for p in (0.01, 0.001))  # the bar is 0.05 / 18
    assert decide_dimensions(tests(0.5, 0.4, 0.9), one).verdict == "supports"
    assert decide_dimensions(tests(0.5, 0.4, 0.9, power=0.5), one).verdict == "inconclusive"
    assert decide_dimensions(tests(0.001, 0.002, 0.0), two).verdict == "contradicts"
    assert decide_dimensions(tests(0.001, 0.4, 0.9), one).verdict == "inconclusive"
    assert decide_dimensions(tests(0.5, 0.4), one).verdict == "inconclusive"
    for settings in (one[:17], [*one[:17], two[0]], [*one[:17], None]):
        assert decide_dimensions(tests(0.5, 0.4, 0.9), settings).verdict == "inconclusive"
    assert decide_dimensions(tests(0.001, 0.002, 0.0), [*two[:17], one[0]]).verdict == "inconclusive"


def fits(sources, p_value: float, kind: str = ""):
    return [{"source": source + kind, "k": k, "alpha": 2.0, "p_value": p_value, "likelihood_ratios": {}}
            for source in sources for k in (64, 128, 256)]  # fmt: skip


_NO_FIT = {"alpha": None, "p_value": None}
_BEATEN = {"likelihood_ratios": {"lognormal": {"ratio": -4.0, "p_value": 0.01}}}


def power_law(
    data: float, null: float, bootstraps: int = 1000, seeds=(0, 1, 2), kinds=("shuffled", "gaussian", "sphere"),
    unlucky: int = 0, each: Any = None, of_sphere: Any = None,
):  # fmt: skip
    """The verdict with p-values of ``data`` (three fits a k and source, ``unlucky`` of all less) and of ``null``.

    ``each`` changes all fits of the data, ``of_sphere`` those of one kind of null.
    """
    sources = [f"mtc-{seed}" for seed in seeds]
    metrics = {"frontier": [{"run": f"mtc-{seed}", "seed": seed} for seed in seeds], "cluster_bootstraps": bootstraps}
    nulls = [fit for kind in kinds for fit in fits(sources, null, f"/{kind}")]
    of_data = [fit for _ in range(3) for fit in fits(sources, data)]
    of_data[:unlucky] = [fit | {"p_value": 0.01} for fit in of_data[:unlucky]]
    of_data = [fit | (each or {}) for fit in of_data]
    nulls = [fit | (of_sphere or {}) if fit["source"].endswith("/sphere") else fit for fit in nulls]
    return decide_power_law(metrics, sources, of_data, nulls).verdict


def test_a_power_law_needs_data_that_pass_and_nulls_that_do_not():
    assert power_law(0.5, 0.01) == "supports"
    assert power_law(0.5, 0.5) == "inconclusive"
    assert power_law(0.01, 0.5) == "contradicts"
    assert power_law(0.5, 0.01, unlucky=5) == "supports", "5 of 27 fits"
    assert power_law(0.5, 0.01, unlucky=6) == "inconclusive"
    assert power_law(0.5, 0.01, bootstraps=100) == "inconclusive"
    assert power_law(0.5, 0.01, seeds=(0, 1)) == "inconclusive"
    assert power_law(0.5, 0.01, kinds=("shuffled", "gaussian")) == "inconclusive"
    assert power_law(0.5, 0.01, each=_BEATEN) == "contradicts", "a rival fits better"
    assert power_law(0.5, 0.5, of_sphere=_BEATEN) == "inconclusive"
    assert power_law(0.5, 0.01, of_sphere=_BEATEN) == "supports"
    assert power_law(0.5, 0.01, of_sphere=_NO_FIT) == "inconclusive", "a null without a fit is not ruled out"
    assert power_law(0.5, 0.01, each=_NO_FIT) == "inconclusive", "no fit at any k"
    assert power_law(0.5, 0.01, each={"k": 64}) == "inconclusive", "one k"


def test_attention_output_needs_both_kinds_and_induction_features_their_heads():
    def labels(induction, succession, expected=1.0, p_value=0.01):
        return [(seed, {"induction": {"count": induction, "expected": expected, "p_value": None}, "succession": {
                        "count": succession, "expected": expected, "p_value": p_value}}) for seed in range(3)]  # fmt: skip

    many, few = ([labels(n, n)[0][1]] * 6 for n in (9, 2))
    assert decide_labels(labels(9, 5), many).verdict == "supports"
    assert decide_labels(labels(9, 2), many).verdict == "inconclusive"
    assert decide_labels(labels(9, 5, p_value=0.05), many).verdict == "inconclusive", "as many in 5% of exchanges"
    assert decide_labels(labels(2, 2), few).verdict == "contradicts"
    assert decide_labels(labels(9, 5, expected=4.0), few).verdict == "contradicts"
    assert decide_labels(labels(9, 5)[:2], many).verdict == "inconclusive"
    for settings in (many[:5], [*many[:5], few[0]], [*many[:5], labels(9, 2)[0][1]]):
        assert decide_labels(labels(9, 5), settings).verdict == "inconclusive"
    assert decide_labels(labels(2, 2), [*few[:5], labels(2, 9)[0][1]]).verdict == "inconclusive"

    def shares(*values):
        return [(seed, {"interval": None if v is None else [v - 0.1, v + 0.1], "expected_share": 0.5})
                for seed, v in enumerate(values)]  # fmt: skip

    above, below = ([share for _, share in shares(*[value] * 18)] for value in (0.7, 0.3))
    assert decide_heads(shares(0.9, 0.8, 0.7), above).verdict == "supports"
    assert decide_heads(shares(0.9, 0.8, 0.55), above).verdict == "inconclusive"
    assert decide_heads(shares(0.1, 0.2, 0.45), below).verdict == "inconclusive"
    assert decide_heads(shares(0.1, 0.2, 0.3), below) == (
        "contradicts",
        "the whole interval lies below at every seed and setting",
    )
    assert decide_heads(shares(0.9, None, None), above).verdict == "inconclusive"
    assert decide_heads(shares(0.9, 0.8, 0.7, None), above).verdict == "inconclusive", "a seed with too few features"
    for settings in (above[:17], [*above[:17], below[0]], [*above[:17], shares(None)[0][1]], [*above[:17], None]):
        assert decide_heads(shares(0.9, 0.8, 0.7), settings).verdict == "inconclusive"
    assert decide_heads(shares(0.1, 0.2, 0.3), [*below[:17], above[0]]).verdict == "inconclusive"


def test_matched_features_are_told_in_words_of_the_two_runs():
    metrics = documents((0,)) | evidence()
    metrics["frontier"] = [{"run": "top1-60", "series": "top1"}, {"run": "mtc-60", "series": "mtc"}]
    assert _matched_text(metrics, "top1", "mtc") == (
        " On the 40 features that top1-60 has as well, mtc-60 against it: breadth of attention 1.20 times (1.10 to "
        "1.30) (median of the ratio, 95% over features).")  # fmt: skip
    assert _matched_text(metrics, "mtc", "top1") == ""
    metrics["meaning"]["matches"][0]["measures"] = {"breadth": None, "tokens": None}
    assert _matched_text(metrics, "top1", "mtc") == ""


def heads(
    null: float | None, spread: float = 2.0, dose=(1.2, 1.1, 1.05), denser: float | None = None,
    longer: float | None = None, exception: tuple[str, int] | None = None, null_seeds=(0, 1, 2), settings=18,
    at_settings: float | None = None,
):  # fmt: skip
    """The verdict on heads per feature; ``dose``: errors with 1, 2 and 4 movers over that with all, ``denser``: that
    with all at a second sparsity, over the same, ``longer`` the same again where all were trained longer. ``exception``
    is a series and seed whose features have one head each; ``at_settings`` the null's heads per feature at the last of
    ``settings``."""
    arguments, norms = documents((0, 1, 2)), ("mtc", "mtc-penalty-l1", "mtc-penalty-l2")
    rows = [r for r in arguments["records"] if r["series"] not in ("heads2", "heads4", "top1", "mtc")]
    for seed in (0, 1, 2):
        rows += [record(series, 60, 0.1, seed) for series in norms]
        for series, factor, m in zip(("top1", "heads2", "heads4"), dose, (1, 2, 4), strict=True):
            rows.append(record(series, 60, 0.1 * factor, seed, heads_per_feature=m))
            if denser is not None:
                rows.append(record(series, 110, 0.05 * factor, seed, heads_per_feature=m))
        if denser is not None:
            rows.append(record("mtc", 110, 0.05 * denser, seed))
        if longer is not None:
            rows += [record(f"{series}-long", 110, 0.04 * factor, seed)
                     for series, factor in zip(("top1", "heads2", "heads4", "mtc"), (*dose, longer), strict=True)
                     ]  # fmt: skip
    for row in rows:
        if row["evaluation"]["superposition"] is not None and row["series"] in norms:
            own = 1.0 if (row["series"], row["seed"]) == exception else spread
            row["evaluation"]["superposition"] |= {"participation_ratio_mean": own}
    planted = [{"series": name, "k": 60, "seed": seed, "participation_ratio_mean": null, "heads_per_feature": "all"}
               for name in norms for seed in null_seeds]  # fmt: skip
    others = [record("mtc-settings", 60, 0.1, run=f"setting{i}", learning_rate=float(i)) for i in range(settings)]
    for row in others:
        row["evaluation"]["superposition"] |= {"participation_ratio_mean": spread}
    rows += others
    alike = [{"run": row["run"], "participation_ratio_mean": null} for row in others]
    if at_settings is not None:
        alike[-1]["participation_ratio_mean"] = at_settings
    nulls = None if null is None else {"teacher": "t", "teacher_normalised_mse": 0.1, "noise_share": 0.1,
                                       "comparisons": {}, "rows": planted, "settings": alike}  # fmt: skip
    arguments |= {"records": rows, "nulls": nulls}
    metrics = collect(**arguments, profile="test", config=CONFIG, inputs={})
    return next(f.verdict for f in judge(metrics, CONFIG) if f.key == "heads-per-feature")


def test_heads_per_feature_must_exceed_the_nulls_and_the_dose_response_fall():
    assert heads(1.3) == "supports"
    assert heads(1.3, dose=(1.2, 1.1, 1.15)) == "inconclusive"
    assert heads(1.3, denser=1.0) == "supports"
    assert heads(1.3, denser=1.06) == "inconclusive", "not at every sparsity, though on average"
    assert heads(2.5) == "contradicts"
    assert heads(None) == "inconclusive"
    assert heads(1.3, denser=1.08) == "inconclusive"
    assert heads(1.3, denser=1.08, longer=1.0) == "supports", "an MTC behind four movers was trained too short"
    assert heads(1.3, denser=1.0, longer=1.08) == "inconclusive"
    for series in ("mtc", "mtc-penalty-l1", "mtc-penalty-l2"):
        assert heads(1.3, exception=(series, 1)) == "inconclusive", "every seed under every norm"
    assert heads(1.3, null_seeds=(0,)) == "inconclusive", "one seed of the null"
    assert heads(1.3, settings=17) == "inconclusive"
    assert heads(1.3, at_settings=2.1) == "inconclusive", "no more than the null trained alike"
    assert heads(2.5, at_settings=1.9) == "inconclusive", "more than the null at one setting"
    assert heads(2.5, settings=17) == "inconclusive"


def test_the_null_is_told_with_its_planted_noise_and_without():
    """Errors 0.15 and 0.2 of which 0.1 is noise: 0.75 with it, 0.5 without."""
    nulls = {"noise_share": 0.1, "comparisons": {"mtc": ratio(0.75, 0.8)},
             "rows": [{"heads_per_feature": 1, "normalised_mse": 0.2}, {"heads_per_feature": 1, "normalised_mse": 0.4},
                      {"heads_per_feature": "all", "normalised_mse": 0.15}]}  # fmt: skip
    assert _nulls(nulls)["mtc"]["above_noise"] == pytest.approx([0.5, 0.6])
    assert _nulls(nulls | {"noise_share": 0.2})["mtc"]["above_noise"] is None
    assert _nulls(None) == {}


def test_a_sweep_is_set_beside_its_null_at_the_nulls_sparsities():
    arguments = documents((0, 1, 2))
    rows = [{"series": "mtc", "k": k, "heads_per_feature": heads, "normalised_mse": 0.1,
             "participation_ratio_mean": 1.0} for k in (60, 110) for heads in ("all", 1)]  # fmt: skip
    nulls = {"teacher": "t", "teacher_normalised_mse": 0.1, "noise_share": 0.1, "comparisons": {}, "rows": rows}
    metrics = collect(**arguments | {"nulls": nulls}, profile="test", config=CONFIG, inputs={})
    own = metrics["comparisons"]["mtc_over_top1"]["own"]
    assert own["l0_range"] == [60, 110]
    assert own["n_sparsities"] == 2
    without = collect(**arguments, profile="test", config=CONFIG, inputs={})
    assert "own" not in without["comparisons"]["mtc_over_top1"]


def test_another_target_is_shown_for_the_reader():
    arguments = documents((0,))
    pair = (("mtc-resid", 4, "all"), ("top1-resid", 5, 1))
    other = [record(series, l0, factor / l0, target="resid_out", heads_per_feature=heads)
             for series, factor, heads in pair for l0 in (30, 110)]  # fmt: skip
    arguments["records"] = [r for r in arguments["records"] if r["series"] != "mtc-resid"] + other
    metrics = collect(**arguments, profile="test", config=CONFIG, inputs={})
    (found,) = [f for f in judge(metrics, CONFIG) if f.key == "superposition"]
    assert "For the reader, mtc-resid over top1-resid: normalised MSE ratio 0.800" in found.figure
