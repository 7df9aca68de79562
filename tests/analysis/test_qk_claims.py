"""Every rule about QK features is met once and flipped once by the number it hangs on."""

import pytest

from crosshead.analysis.claims.qk import (
    SERIES,
    decide_features,
    decide_insufficient,
    decide_interpretable,
    decide_multi_head,
    decide_rank,
    findings,
)

REFERENCES = [{"name": f"coordinates/{r}", "l0": float(r), "normalised_mse": 0.5, "kl": 0.1, "per_head": [0.5]}
              for r in (8, 64)]  # fmt: skip
REFERENCES += [{"name": f"svd/{r}", "l0": r + 1.0, "normalised_mse": mse, "kl": 0.1, "per_head": [mse]}
               for r, mse in ((2, 0.2), (8, 0.04), (32, 0.01))]  # fmt: skip


def record(series: str, l0: float, mse: float, seed: int = 0, rank: int = 1, **other):
    return {
        "run": f"{series}-{l0:g}-{seed}", "series": series, "architecture": "qk_diagonal", "seed": seed, "l0": l0,
        "normalised_mse": mse, "n_tokens": 1000, "features": 128, "tokens_trained": 500,
        "config": {"heads": [3], "rank": rank},
        "evaluation": {"normalised_mse": mse, "context_squared_error": [mse * x for x in (9.0, 10.0, 11.0)],
                       "context_variance": [9.0, 10.0, 11.0], "references": REFERENCES},
    } | other  # fmt: skip


def sweep(series: str, factor: float = 1.0, slope: float = -1.0, seeds=(0, 1, 2), n: int = 4, **other):
    return [record(series, l0, factor * 0.8 * (l0 / 2) ** slope, seed, **other)
            for seed in seeds for l0 in (2.0, 4.0, 8.0, 16.0)[:n]]  # fmt: skip


def test_rank_one_is_insufficient_where_no_run_reaches_a_low_error():
    assert decide_insufficient(sweep("a", 1.0)).verdict == "supports"
    early = [r | {"normalised_mse": 0.04 if r["l0"] == 4 else r["normalised_mse"]} for r in sweep("a")]
    assert decide_insufficient(early).verdict == "contradicts", "at 4, the SVD at 9"
    late = decide_insufficient(sweep("a", 0.4))
    assert late.verdict == "inconclusive"
    assert "dense references" in late.reason, "at 16"
    few = REFERENCES[0] | {"l0": 3.0, "normalised_mse": 0.04}
    coordinates = [r | {"evaluation": {"references": [few, *REFERENCES]}} for r in early]
    assert decide_insufficient(coordinates).verdict == "inconclusive"
    mixed = [r | {"normalised_mse": r["normalised_mse"] * (0.4 if r["seed"] else 1.0)} for r in sweep("a")]
    assert decide_insufficient(mixed).verdict == "inconclusive"
    assert decide_insufficient(sweep("a", seeds=(0, 1))).verdict == "inconclusive"
    assert decide_insufficient(sweep("a", n=3)).verdict == "inconclusive"
    dense = [r | {"l0": r["l0"] + 64} for r in sweep("a", 0.4)]
    assert decide_insufficient(dense).verdict == "supports", "as dense as the exact basis"


def test_a_sweep_that_ends_before_a_dense_basis_is_good_says_nothing():
    short = [r | {"l0": r["l0"] / 2} for r in sweep("a")]
    assert decide_insufficient(short).verdict == "inconclusive"
    assert "ends before" in decide_insufficient(short).reason
    without = [r | {"evaluation": r["evaluation"] | {"references": REFERENCES[:2]}} for r in sweep("a")]
    assert decide_insufficient(without).verdict == "inconclusive"


def test_several_heads_need_a_flat_curve():
    assert decide_multi_head(sweep("a", slope=-0.05)).verdict == "supports"
    assert decide_multi_head(sweep("a", slope=-0.5)).verdict == "contradicts"
    mixed = sweep("a", slope=-0.05, seeds=(0, 1)) + sweep("a", slope=-0.5, seeds=(2,))
    assert decide_multi_head(mixed).verdict == "inconclusive"
    assert decide_multi_head(sweep("a", slope=-0.5, seeds=(0,))).verdict == "inconclusive"
    assert decide_multi_head(sweep("a", slope=-0.5, n=2)).verdict == "inconclusive"
    flat = [r | {"l0": 4.0} for r in sweep("a")]
    assert "does not vary" in decide_multi_head(flat).reason


def ratio(low: float, high: float, **other):
    return {"ratio": (low + high) / 2, "interval": [low, high], "n_seeds": 3, "n_sparsities": 4, "equal_tokens": True,
            "l0_range": [2.0, 16.0]} | other  # fmt: skip


def test_more_features_do_not_help_unless_every_interval_lies_below_one():
    assert decide_features([ratio(0.95, 1.1), ratio(1.1, 1.2)]).verdict == "supports"
    assert "not excluded" in decide_features([ratio(0.85, 1.1), ratio(1.1, 1.2)]).reason
    assert decide_features([ratio(0.8, 0.9), ratio(0.7, 0.95)]).verdict == "contradicts"
    assert decide_features([ratio(0.8, 0.9), ratio(0.9, 1.1)]).verdict == "inconclusive"
    assert decide_features([ratio(1.1, 1.2, n_seeds=1)]).verdict == "inconclusive"
    assert decide_features([ratio(0.9, 1.1, n_sparsities=2)]).verdict == "inconclusive"
    assert decide_features([ratio(0.9, 1.1, interval=None)]).verdict == "inconclusive"


def test_high_rank_is_judged_by_the_highest():
    number = ratio(0.8, 1.2)
    assert decide_rank({2: ratio(0.9, 1.1), 16: ratio(0.5, 0.6)}, number).verdict == "supports"
    assert decide_rank({2: ratio(0.5, 0.6), 16: ratio(1.1, 1.2)}, number).verdict == "contradicts"
    assert decide_rank({16: ratio(0.9, 1.1)}, number).verdict == "inconclusive"
    assert decide_rank({16: ratio(0.5, 0.6)}, ratio(1.1, 1.2)).verdict == "inconclusive", "worse per number"
    assert decide_rank({16: ratio(0.5, 0.6)}, ratio(1.1, 1.2, interval=None)).verdict == "inconclusive"
    assert decide_rank({}, None).verdict == "inconclusive"


def row(seed: int, share: float, n: int = 10, beating: int = 10, rank: int = 1, score: float = 0.5, read: int = 10):
    side = {"grain": "token", "what": "x", "share": 1.0, "expected": 0.1, "tokens": []}
    broad = side | {"grain": "broad"}
    features = [{"feature": i, "share_text": share, "permuted_largest": 0.2 if i < beating else 1.0, "query": broad,
                 "before_key": side if i < read else broad, "score": score}
                for i in range(n)]  # fmt: skip
    return {
        "run": f"r{seed}",
        "seed": seed,
        "rank": rank,
        "features": features,
        "n_live": 100,
        "n_induction": 12 if score >= 0.3 else 0,
    }


def test_interpretable_needs_ten_features_that_beat_every_permuted_pair():
    assert decide_interpretable([row(s, 0.9) for s in range(3)]).verdict == "supports"
    assert decide_interpretable([row(s, 0.9, beating=3) for s in range(3)]).verdict == "contradicts"
    assert decide_interpretable([row(s, 0.9, beating=7) for s in range(3)]).verdict == "inconclusive"
    assert decide_interpretable([row(s, 0.9, read=4) for s in range(3)]).verdict == "inconclusive", "beats, unread"
    assert decide_interpretable([row(s, 0.1) for s in range(3)]).verdict == "contradicts"
    assert decide_interpretable([row(s, 0.9, n=6, beating=6) for s in range(3)]).verdict == "inconclusive"
    assert decide_interpretable([row(s, 0.9) for s in range(2)]).verdict == "inconclusive"


def test_features_below_the_threshold_are_no_induction_features():
    weak = [row(s, 0.9, score=0.29) for s in range(3)]
    assert decide_interpretable(weak).verdict == "inconclusive"
    strong = [row(s, 0.9) for s in range(3)]
    assert (
        decide_interpretable([*weak, *strong]).verdict == decide_interpretable([*strong, *weak]).verdict == "supports"
    )


def test_every_claim_that_was_run_gets_a_row():
    records = [
        *sweep(SERIES["rank_one"]),
        *sweep(f"{SERIES['more_features']}512", 1.3, features=512),
        *sweep(SERIES["multi_head"], slope=-0.02),
        *sweep(f"{SERIES['high_rank']}2", 0.5, config={"heads": [3], "rank": 2}),
    ]
    metrics = {"profile": "laptop", "attention": records, "explain": {"induction": [row(s, 0.9) for s in range(3)]}}
    found = [finding for finding in findings(metrics, None) if finding is not None]
    assert [f.key for f in found] == [
        "qk-rank-one",
        "qk-multi-head",
        "qk-more-features",
        "qk-high-rank",
        "qk-induction",
    ]
    assert [f.verdict for f in found] == ["supports"] * 5
    assert "0.800 at 2.0" in found[0].figure
    # At L0 times rank the sweep lies at 4 to 32 with the errors that rank 1 has at 4 to 16.
    assert "rank 2 over rank 1: ratio 1.00 (95% 1.00 to 1.00) at pair L0 4.0 to 16.0" in found[3].control


@pytest.mark.parametrize("metrics", [{"profile": "smoke"}, {"profile": "smoke", "attention": [], "explain": None}])
def test_claims_without_runs_are_left_out(metrics):
    assert [f for f in findings(metrics, None) if f is not None] == []
