"""Verdicts about what features mean must hold at every setting of training: each is flipped by one of them."""

from itertools import product
from typing import Any

import pytest

from crosshead.analysis.findings import ReportConfig, collect
from crosshead.analysis.verdicts import judge
from tests.analysis.records import documents, evidence, meant, record

CONFIG = ReportConfig()
STARTS, RATES, LENGTHS = ("energy", "maps", "random"), (1e-3, 2e-3, 4e-3), (60, 120)
DESCRIBED = ("mtc", "top1", "joint-top1", "attn-out-sae")


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crosshead.analysis.frontiers._DRAWS", 20)
    monkeypatch.setattr("crosshead.analysis.frontiers._BETWEEN", 8)


def described() -> dict[str, Any]:
    """Metrics of three seeds whose features mean clear things, at every setting of their training as well."""
    settings = {
        (name, f"{name}-{start}-{rate:g}-{steps}"): {"start": start, "learning_rate": rate, "steps": steps}
        for name in DESCRIBED
        for start in (STARTS if name in ("mtc", "top1") else (None,))
        for rate, steps in product(RATES, LENGTHS)
    }
    given = documents((0, 1, 2))
    given["records"] += [record("joint-top1", 60, 0.2, seed) for seed in (0, 1, 2)]
    given["records"] += [record(f"{name}-settings", 60, 0.2, **own, run=run) for (name, run), own in settings.items()]
    metrics = collect(**given, **evidence(), profile="test", config=CONFIG, inputs={})
    meaning = metrics["meaning"]
    labels = {name: {"count": 9, "expected": 0.5, "p_value": None} for name in ("induction", "succession")}
    read = {key: value for key, value in meaning["runs"]["mtc-60"].items() if key != "examples"}
    bits = {"mtc": (0.5, 0.6), "top1": (0.3, 0.4), "joint-top1": (0.1, 0.2), "attn-out-sae": (0.1, 0.2)}
    of = {name: read | meant(*bits[name], 0) | {"labels": labels} for name in DESCRIBED}
    summary = {"content_discoveries": 9, "content_expected_under_shuffle": 0.1, "discoveries": 9,
               "expected_under_shuffle": 0.1}  # fmt: skip
    test = {"dip": 0.1, "p_value": 0.4, "n": 16}
    ends = ("", "-s1", "-s2")
    meaning["runs"] = {f"{name}-60{end}": of[name] | {"examples": []} for name in DESCRIBED for end in ends}
    meaning["enrichment_summary"] = {f"mtc-60{end}": summary for end in ends}
    meaning["modality"] = {f"mtc-60{end}": {"ov_dimension": test | {"power": 0.9}} for end in ends}
    clusters = {"enrichment_summary": summary, "modality": {"ov_dimension": test}}
    meaning["settings"] = {run: of[name] | clusters for name, run in settings}
    return metrics


READ = ("top1-interpretability", "coupling-interpretability", "clusters-semantic", "ov-dimension", "attention-output",
        "induction-heads")  # fmt: skip
AT = "-random-0.004-120"
MORE = meant(0.6, 0.7, 0)["predictability"]


@pytest.mark.parametrize(("key", "spoiled", "changes"), [
    ("top1-interpretability", "top1" + AT, {"predictability": MORE}),
    ("coupling-interpretability", "joint-top1-None-0.004-120", {"predictability": MORE}),
    ("clusters-semantic", "mtc" + AT, {"enrichment_summary": None}),
    ("ov-dimension", "mtc" + AT, {"modality": None}),
    ("ov-dimension", "mtc" + AT, {"modality": {"ov_dimension": {"p_value": 1 / 501}}}),
    ("attention-output", "attn-out-sae-None-0.004-120", {"labels": {}}),
    ("induction-heads", "mtc" + AT, {"induction_heads": None}),
])  # fmt: skip
def test_what_features_mean_must_hold_at_every_setting(key: str, spoiled: str, changes: dict[str, Any]):
    metrics = described()
    found = {finding.key: finding for finding in judge(metrics, CONFIG)}
    assert {name: found[name].verdict for name in READ} == dict.fromkeys(READ, "supports")
    n = 6 if key == "attention-output" else 18
    assert f"Over {n} settings of" in found[key].figure
    metrics["meaning"]["settings"][spoiled] |= changes
    again = {finding.key: finding for finding in judge(metrics, CONFIG)}
    assert {name: again[name].verdict for name in READ if again[name].verdict != "supports"} == {key: "inconclusive"}
    wrong = 3 if key == "coupling-interpretability" else 1  # a joint SAE has one start, a Top-1 MTC three
    assert again[key].reason == f"holds at {n - wrong} of {n} settings of start, rate and length"


def test_a_setting_that_was_not_described_keeps_a_verdict_open():
    metrics = described()
    del metrics["meaning"]["settings"]["mtc" + AT]
    found = {finding.key: finding.reason for finding in judge(metrics, CONFIG)}
    for key in ("top1-interpretability", "clusters-semantic", "ov-dimension", "induction-heads"):
        assert found[key] == "17 settings of start, rate and length were tried of 18"
