"""Rules about the instruments, where the truth is known, and what superposition's rule takes from there."""

import pytest

from crosshead.analysis.claims.planted import called_right, decide_planted
from crosshead.analysis.claims.superposition import calibration


def planted_rows(mtc=0.98, top1=0.1, superposed=True, seeds=(0, 1, 2), alone=None, toy_l0=1.0):
    rows = []
    for seed in seeds:
        for layer in ("one-head", "superposed"):
            for name, share in (("mtc", mtc), ("top1", (alone or mtc) if layer == "one-head" else top1)):
                rows.append({"question": "recovery", "seed": seed, "layer": layer, "architecture": name,
                             "share_recovered": share})  # fmt: skip
            rows.append(
                {"question": "superposition", "layer": layer, "superposed": superposed == (layer != "one-head")}
            )
        rows.append({"question": "shared_layers", "layers": "other_contexts", "found": False})
        rows.append({"question": "toys", "superposed": True, "mtc_l0": toy_l0, "top1_l0": 1.0})
    return rows


def test_instruments_must_find_what_was_planted_and_call_it_what_it_is():
    assert decide_planted(planted_rows()).verdict == "supports"
    assert decide_planted(planted_rows(mtc=0.9)).verdict == "inconclusive"
    assert decide_planted(planted_rows(top1=0.7)).verdict == "inconclusive"
    assert decide_planted(planted_rows(alone=0.4)).verdict == "inconclusive", "Top-1 fails where it must not"
    assert decide_planted(planted_rows(toy_l0=1.1)).verdict == "inconclusive", "more active features than Top-1"
    assert decide_planted(planted_rows(superposed=False)).verdict == "inconclusive"
    assert decide_planted(planted_rows(mtc=0.3)).verdict == "contradicts"
    assert decide_planted(planted_rows(seeds=(0,))).verdict == "inconclusive"
    pairs = [row | ({"found": True} if row["question"] == "shared_layers" else {}) for row in planted_rows()]
    assert decide_planted(pairs).verdict == "inconclusive", "structure found where rows come from other contexts"
    wrong = [
        row | ({"superposed": False} if row["question"] == "toys" else {}) for row in planted_rows(superposed=False)
    ]
    assert decide_planted(wrong).verdict == "contradicts", "most calls are wrong"


@pytest.mark.parametrize(
    ("row", "right"),
    [
        ({"question": "superposition", "layer": "one-head", "superposed": True}, False),
        ({"question": "shared_layers", "layers": "separate", "found": False}, True),
        ({"question": "toys", "superposed": True, "mtc_l0": 1.0, "top1_l0": 0.8}, False),
        ({"question": "phases"}, None),
    ],
)
def test_a_call_is_right_or_wrong_where_a_question_has_an_answer(row, right):
    assert called_right(row) is right


def test_calibration_is_the_least_that_one_head_layers_show_of_their_null():
    def layer(name, ratio, null):
        return {"question": "superposition", "layer": name, "ratio": ratio, "null_ratio": null}

    rows = [layer("one-head", 0.9, 1.0), layer("one-head", 0.8, 0.8), layer("superposed", 0.1, 1.0),
            {"question": "phases", "layer": "one-head", "ratio": 0.01}]  # fmt: skip
    assert calibration({"rows": rows}) == pytest.approx(0.9)
    assert calibration({"rows": rows[2:]}) is None
    assert calibration(None) is None
