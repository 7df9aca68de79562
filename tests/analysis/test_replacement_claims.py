"""Every rule about replacement layers is met once and flipped once by the number it hangs on."""

import pytest

from crosshead.analysis.claims.replacement import chance_of, compare_widths, decide_life, decide_width, findings


def row(seed: int, confirmed: int = 6, found: int = 5, control: int = 0):
    return {
        "run": f"arl-s{seed}", "series": "arl-wide", "seed": seed,
        "skip_trigrams": {"n_heads": 8, "n_confirmed": confirmed, "chance": 1 / 4, "triples": [
            {"query": " a", "key": " b", "token": " c", "fall": 0.5, "confirmed": True}]},
        "induction": {"n_found": found, "n_found_by_control": control, "n_live": 60, "best_score": 0.4,
                      "base_scores": [0.1, 0.7], "n_tokens": 500,
                      "removal": {"clean": 1.0, "without_found": 1.5, "without_others": 1.1}},
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "verdict"), [
    ([row(0), row(1), row(2)], "supports"),
    ([row(0), row(1)], "inconclusive"),
    ([row(0), row(1), row(2, confirmed=3)], "inconclusive"),
    ([row(0), row(1), row(2, found=0)], "inconclusive"),
    ([row(0), row(1), row(2, found=5, control=2)], "inconclusive"),
    ([row(s, confirmed=2, found=0) for s in range(3)], "contradicts"),
    ([row(0, confirmed=2, found=0), row(1, confirmed=2, found=1), row(2, confirmed=2, found=0)], "inconclusive"),
])  # fmt: skip
def test_signs_of_life_need_both_kinds_at_every_seed(rows, verdict):
    assert decide_life(rows).verdict == verdict


def test_chance_is_binomial():
    assert chance_of({"n_heads": 2, "n_confirmed": 1, "chance": 1 / 4}) == pytest.approx(7 / 16)
    assert chance_of({"n_heads": 0, "n_confirmed": 0, "chance": 1 / 4}) == pytest.approx(1.0)


def record(series: str, seed: int, error: float, tokens: int = 100):
    return {"run": f"{series}-{seed}", "series": series, "seed": seed, "architecture": "replacement", "l0": 12.0,
            "features": 64, "tokens_trained": tokens, "parameters": 1000, "normalised_mse": error,
            "evaluation": {"context_squared_error": [error * w for w in (9, 10, 11)], "heads_alive": 60}}  # fmt: skip


def verdict(errors: tuple[float, float], seeds: int = 3, tokens: int = 100) -> str:
    wide = [record("arl-wide", s, errors[0] * (1 + 0.01 * s)) for s in range(seeds)]
    narrow = [record("arl-narrow", s, errors[1], tokens) for s in range(seeds)]
    return decide_width(compare_widths(wide, narrow)).verdict


def test_many_heads_beat_few_with_the_whole_interval_at_equal_tokens():
    assert verdict((0.2, 0.3)) == "supports"
    assert verdict((0.3, 0.2)) == "contradicts"
    assert verdict((0.3, 0.303)) == "inconclusive"
    assert verdict((0.2, 0.3), seeds=2) == "inconclusive"
    assert verdict((0.2, 0.3), tokens=90) == "inconclusive"


def test_findings_are_left_out_without_their_runs_and_state_what_they_rest_on():
    assert findings({"profile": "laptop"}, None) == [None, None]
    rows = [record("arl-wide", 0, 0.2), record("arl-narrow", 0, 0.3)]
    life, width = findings({"profile": "laptop", "attention": rows, "replacements": {"heads": [row(0)]}}, None)
    assert life is not None
    assert width is not None
    assert life.verdict == width.verdict == "inconclusive"
    assert "6 of 8 skip trigrams" in life.figure
    assert "[' a' after ' b' -> ' c'] 0.50" in life.figure
    assert "ratio 0.667" in width.figure
