"""Can attention scores be written as sparse features that interact one with one? QK diagonalization."""

from collections.abc import Mapping, Sequence
from typing import Any

from crosshead.analysis.frontiers import compare_series
from crosshead.analysis.rules import SEEDS_TO_DECIDE, Decision, Finding, Record, commands, decide, too_few

__all__ = [
    "SERIES",
    "decide_features",
    "decide_insufficient",
    "decide_interpretable",
    "decide_multi_head",
    "decide_rank",
    "findings",
]

SERIES = {"rank_one": "qk-rank1", "more_features": "qk-features", "multi_head": "qk-heads", "high_rank": "qk-rank"}
"""Series of attention runs: the rank-1 sweep; rank-1 sweeps at other numbers of features (``qk-features<F>``); the sweep
over all heads; sweeps at higher rank (``qk-rank<r>``, r > 1)."""
LOW = 0.05
"""A normalised MSE at or below this is low: 95% of the centred scores' variance is explained."""
STEEP = 0.1
"""The error falls when doubling L0 lowers it by at least 10%."""
TOP = 10
INDUCTION = 0.3
"""Score from which a feature is an induction feature: the one that ``n_induction`` counts by."""
CLEAR = 0.8
"""Share of the described features that must beat every permuted pair."""
READABLE = 0.5
"""Share of the described features of which a side must be described by something finer than ``broad``."""
EQUIVALENT = 0.1
"""A gain of 10% that an interval does not exclude is not absent."""


def findings(metrics: Record, config: Any) -> list[Finding | None]:
    """One row per claim; claims without their runs are left out."""
    records = [r for r in metrics.get("attention") or [] if r["architecture"] == "qk_diagonal"]
    explain = metrics.get("explain")
    return [
        _insufficient(metrics, records),
        _multi_head(metrics, records),
        _features(metrics, records),
        _rank(metrics, records),
        _interpretable(metrics, explain),
    ]


def _of(records: Sequence[Record], series: str) -> list[Record]:
    return [r for r in records if r["series"] == series]


def _by_seed(records: Sequence[Record]) -> dict[int, list[Record]]:
    seeds: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda r: r["l0"]):
        seeds.setdefault(record["seed"], []).append(record)
    return seeds


def _curve(records: Sequence[Record]) -> str:
    points = sorted(records, key=lambda r: r["l0"])
    return ", ".join(f"{r['normalised_mse']:.3f} at {r['l0']:.1f}" for r in points)


def _references(record: Record, kind: str) -> str:
    found = [r for r in record["evaluation"]["references"] if r["name"].split("/")[0] == kind]
    return ", ".join(f"{r['normalised_mse']:.3f} at {r['l0']:.0f}" for r in found)


# ---- rank 1 is not enough ----


def _insufficient(metrics: Record, records: Sequence[Record]) -> Finding | None:
    own = _of(records, SERIES["rank_one"])
    if not own:
        return None
    verdict, reason = decide_insufficient(own)
    at = own[0]
    return Finding(
        key="qk-rank-one",
        title="Rank-1 QK features are not enough",
        claim="Rank-1 QK features do not reach a low normalised MSE of attention scores.",
        figure=f"Normalised MSE of centred scores at pair L0, head(s) {_heads(at)}: {_curve(own)}; {at['n_tokens']:,} "
        "held-out tokens.",
        control=f"Truncated data-weighted SVD of the rotated form: {_references(at, 'svd')}; signed coordinates: "
        f"{_references(at, 'coordinates')}; mean score by distance: {_references(at, 'mean-score')}.",
        verdict=verdict,
        rule=f"Supports when no run of the sweep comes to {LOW:g} or below at a pair L0 below that of the exact coordinate "
        f"basis although the sweep goes to the pair L0 at which the truncated SVD does, at {SEEDS_TO_DECIDE} seeds or more; "
        "contradicts when one of every seed does, at a pair L0 at which neither the SVD nor signed coordinates do: these are "
        "dense rank-1 features, so coming to what they reach shows nothing about sparse ones.",
        reason=reason,
        picture="qk_frontier.png",
        commands=commands(metrics, "attention", "report"),
    )


def decide_insufficient(records: Sequence[Record]) -> Decision:
    """Does any run reach a low error with fewer active pairs than the exact coordinate basis needs?"""
    seeds = _by_seed(records)
    if (few := too_few(len(seeds))) is not None:
        return few
    if min(map(len, seeds.values())) < 4:
        return Decision("inconclusive", "fewer than four sparsities at a seed")
    reached = [[r for r in own if r["normalised_mse"] <= LOW and r["l0"] < _exact_l0(r)] for own in seeds.values()]
    if not any(reached):
        if any(max(r["l0"] for r in own) < _low_l0(own[0]) for own in seeds.values()):
            return Decision(
                "inconclusive", f"the sweep ends before the pair L0 at which a truncated SVD comes to {LOW:g}"
            )
        return Decision("supports", f"no run comes to {LOW:g}")
    if all(any(r["l0"] < _low_l0(r) for r in own) for own in reached):
        return Decision("contradicts", f"every seed has a run at {LOW:g} or below, before any reference comes to it")
    if all(reached):
        return Decision(
            "inconclusive", f"every seed has a run at {LOW:g} or below, where dense references have one too"
        )
    return Decision("inconclusive", f"some seeds have a run at {LOW:g} or below, others none")


def _exact_l0(record: Record) -> float:
    exact = [r["l0"] for r in record["evaluation"]["references"] if r["name"].startswith("coordinates/")]
    return max(exact, default=float("inf"))


def _low_l0(record: Record) -> float:
    """Pair L0 of the first truncated SVD or set of coordinates with a low error; infinite without one."""
    low = [
        r["l0"]
        for r in record["evaluation"]["references"]
        if r["name"].startswith(("svd/", "coordinates/")) and r["normalised_mse"] <= LOW
    ]
    return min(low, default=float("inf"))


def _heads(record: Record) -> str:
    heads = record["config"]["heads"]
    return "all" if heads == "all" else ", ".join(map(str, heads))


# ---- several heads ----


def _multi_head(metrics: Record, records: Sequence[Record]) -> Finding | None:
    own = _of(records, SERIES["multi_head"])
    if not own:
        return None
    verdict, reason = decide_multi_head(own)
    return Finding(
        key="qk-multi-head",
        title="Several heads: more active features, no lower error",
        claim="With one feature set for all heads of a layer, L0 rises without the error falling.",
        figure=f"Normalised MSE of centred scores at pair L0, mean over heads: {_curve(own)}; {own[0]['n_tokens']:,} held-out "
        "tokens.",
        control=f"One head, rank 1: {_curve(_of(records, SERIES['rank_one'])) or 'not run'}.",
        verdict=verdict,
        rule=f"Over each seed's sweep the error falls by a factor 2^-b per doubling of L0 (least squares in logarithms): "
        f"supports when every seed's doubling lowers it by less than {STEEP:.0%}, contradicts when every seed's lowers it by "
        f"more; {SEEDS_TO_DECIDE} seeds, three sparsities. L0 is set here, where the source's models chose it.",
        reason=reason,
        picture="qk_frontier.png",
        commands=commands(metrics, "attention", "report"),
    )


def decide_multi_head(records: Sequence[Record]) -> Decision:
    """Does the error fall as L0 rises?"""
    seeds = _by_seed(records)
    if (few := too_few(len(seeds))) is not None:
        return few
    if min(map(len, seeds.values())) < 3:
        return Decision("inconclusive", "fewer than three sparsities at a seed")
    gains = [_gain_per_doubling(own) for own in seeds.values()]
    listed = ", ".join("none" if g is None else f"{g:.0%}" for g in gains)
    if any(g is None for g in gains):
        return Decision("inconclusive", "the sweep does not vary in L0")
    if all(g is not None and g < STEEP for g in gains):
        return Decision("supports", f"doubling L0 lowers the error by {listed}")
    if all(g is not None and g >= STEEP for g in gains):
        return Decision("contradicts", f"doubling L0 lowers the error by {listed}")
    return Decision("inconclusive", f"doubling L0 lowers the error by {listed}")


def _gain_per_doubling(records: Sequence[Record]) -> float | None:
    """Share of the error that doubling L0 removes, by least squares in logarithms; None where L0 does not vary."""
    import numpy as np

    x, y = (np.log2([max(r[name], 1e-12) for r in records]) for name in ("l0", "normalised_mse"))
    spread = float(((x - x.mean()) ** 2).sum())
    if spread < 1e-9:
        return None
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / spread
    return 1.0 - 2.0**slope


# ---- more features ----


def _features(metrics: Record, records: Sequence[Record]) -> Finding | None:
    others = sorted({r["series"] for r in records if r["series"].startswith(SERIES["more_features"])})
    base = _of(records, SERIES["rank_one"])
    if not others or not base:
        return None
    comparisons = {name: _compared(_of(records, name), base) for name in others}
    verdict, reason = decide_features(list(comparisons.values()))
    return Finding(
        key="qk-more-features",
        title="More rank-1 features do not help",
        claim="Raising the number of features does not lower the error at a fixed L0.",
        figure="; ".join(f"{_of(records, name)[0]['features']:,} over {base[0]['features']:,} features: {_ratio(found)}"
                         for name, found in comparisons.items()) + ".",
        control=f"{base[0]['features']:,} features: {_curve(base)}.",
        verdict=verdict,
        rule="Supports when no number of features has a ratio of errors at equal pair L0 whose whole interval lies below 1, "
        f"and every interval excludes a gain of {EQUIVALENT:.0%}; contradicts when all lie below 1. Three seeds, equal "
        "tokens, four sparsities in both sweeps.",
        reason=reason,
        picture="qk_frontier.png",
        commands=commands(metrics, "attention", "report"),
    )  # fmt: skip


def decide_features(comparisons: Sequence[Record | None]) -> Decision:
    """Comparisons of more features with fewer, at equal pair L0."""
    found = [decide(c) for c in comparisons]
    unknown = [d for d, c in zip(found, comparisons, strict=True)
               if d.verdict == "inconclusive" and not (c and c["interval"] and "interval holds 1" in d.reason)]  # fmt: skip
    if unknown:
        return unknown[0]
    better = [d.verdict == "supports" for d in found]
    if all(better):
        return Decision("contradicts", "more features have a lower error at equal pair L0")
    if any(better):
        return Decision("inconclusive", "some numbers of features have a lower error, others not")
    lowest = min(c["interval"][0] for c in comparisons if c is not None)
    if lowest <= 1 - EQUIVALENT:
        return Decision(
            "inconclusive", f"an interval begins at {lowest:.2f}: a gain of {EQUIVALENT:.0%} is not excluded"
        )
    return Decision("supports", "no number of features has a lower error at equal pair L0")


# ---- rank ----


def _rank(metrics: Record, records: Sequence[Record]) -> Finding | None:
    ranks = sorted(
        {r["config"]["rank"] for r in records if r["series"] == f"{SERIES['high_rank']}{r['config']['rank']}"} - {1}
    )
    base = _of(records, SERIES["rank_one"])
    if not ranks or not base:
        return None
    comparisons = {rank: _compared(_of(records, f"{SERIES['high_rank']}{rank}"), base) for rank in ranks}
    highest = _of(records, f"{SERIES['high_rank']}{max(ranks)}")
    per_number = _compared([r | {"l0": r["l0"] * max(ranks)} for r in highest], base)
    verdict, reason = decide_rank(comparisons, per_number)
    listed = "; ".join(f"rank {rank}: {_curve(_of(records, SERIES['high_rank'] + str(rank)))} ({_ratio(found)})"
                       for rank, found in comparisons.items())  # fmt: skip
    return Finding(
        key="qk-high-rank",
        title="High-rank QK features do better",
        claim="QK features of higher rank reach a lower error than rank-1 features.",
        figure=f"Normalised MSE at pair L0, and ratio to rank 1 at equal pair L0, {listed}.",
        control=f"Rank 1: {_curve(base)}. An active pair of rank r holds r numbers on either side; at equal pair L0 times "
        f"rank, rank {max(ranks)} over rank 1: {_ratio(per_number)}.",
        verdict=verdict,
        rule="Supports when the highest rank's ratio to rank 1 at equal pair L0 has its whole interval below 1 and that at equal "
        "pair L0 times rank not its whole interval above, contradicts when the first lies above; three seeds, equal tokens, "
        "four sparsities in both sweeps.",
        reason=reason,
        picture="qk_frontier.png",
        commands=commands(metrics, "attention", "report"),
    )


def decide_rank(comparisons: Mapping[int, Record | None], per_number: Record | None) -> Decision:
    """The highest rank against rank 1, at equal pair L0 and (``per_number``) at equal pair L0 times rank."""
    if not comparisons:
        return Decision("inconclusive", "no higher rank was run")
    found = decide(comparisons[max(comparisons)])
    if found.verdict != "supports":
        return found
    if per_number is None or per_number["interval"] is None:
        return Decision("inconclusive", "better at equal pair L0; no common range of pair L0 times rank")
    if per_number["interval"][0] > 1:
        return Decision("inconclusive", "better at equal pair L0, worse at equal pair L0 times rank")
    return found


def _compared(first: Sequence[Record], second: Sequence[Record]) -> Record:
    return compare_series(first, second).model_dump(mode="json") | {
        "n_seeds": len({r["seed"] for r in first} & {r["seed"] for r in second}),
        "equal_tokens": len({r["tokens_trained"] for r in (*first, *second)}) == 1,
    }


def _ratio(found: Record) -> str:
    if found["ratio"] is None or found["l0_range"] is None:
        return "no range of pair L0 that all seeds share"
    interval = "" if found["interval"] is None else " (95% {:.2f} to {:.2f})".format(*found["interval"])
    low, high = found["l0_range"]
    return f"ratio {found['ratio']:.2f}{interval} at pair L0 {low:.1f} to {high:.1f}"


# ---- induction ----


def _interpretable(metrics: Record, explain: Record | None) -> Finding | None:
    rows = [] if explain is None else [r for r in explain["induction"] if r["rank"] == 1]
    if not rows:
        return None
    verdict, reason = decide_interpretable(rows)
    texts = []
    for row in rows:
        described = _induction(row)
        grains = sorted({f["before_key"]["grain"] for f in described})
        texts.append(f"{row['run']}: {row['n_induction']} induction features among {row['n_live']} live ones; of the "
                     f"{len(described)} clearest {_beating(row)} beat every permuted pair on held-out text; the tokens before "
                     f"their keys go by {', '.join(grains) or 'nothing'}")  # fmt: skip
    return Finding(
        key="qk-induction",
        title="Rank-1 induction features are interpretable",
        claim="Some rank-1 QK features are induction features that can be read: the query side fires on X, the key side on the "
        "token after X.",
        figure=f"{'; '.join(texts)}.",
        control="Every query side paired with the key sides of other live features, on the same held-out text.",
        verdict=verdict,
        rule=f"Supports when at {SEEDS_TO_DECIDE} seeds or more each has {TOP} features of score {INDUCTION} or more, "
        f"{CLEAR:.0%} of the clearest {TOP} beat every permuted pair, and {READABLE:.0%} have a query side, or tokens before "
        "their keys, that go by a token, word, substring or word class; contradicts when at every seed fewer than half beat "
        "them. Of several runs of a seed the one with the most induction features counts.",
        reason=reason,
        picture=None,
        commands=commands(metrics, "explain", "report"),
    )


def decide_interpretable(rows: Sequence[Record]) -> Decision:
    """Of the clearest induction features of every seed, how many beat every permuted pair."""
    seeds = {row["seed"]: row for row in sorted(rows, key=lambda row: row["n_induction"])}
    if (few := too_few(len(seeds))) is not None:
        return few
    if any(len(_induction(row)) < TOP for row in seeds.values()):
        return Decision("inconclusive", f"a seed has fewer than {TOP} induction features")
    shares = [_beating(row) / len(_induction(row)) for row in seeds.values()]
    listed = ", ".join(f"{share:.0%}" for share in shares)
    read = [sum(map(_readable, _induction(row))) / len(_induction(row)) for row in seeds.values()]
    if min(shares) >= CLEAR and min(read) < READABLE:
        least = min(read)
        return Decision("inconclusive", f"{listed} of the clearest features beat every permuted pair, but at a seed {least:.0%} "
                        "only have a side that goes by anything")  # fmt: skip
    if min(shares) >= CLEAR:
        return Decision("supports", f"{listed} of the clearest features beat every permuted pair")
    if max(shares) < 0.5:
        return Decision("contradicts", f"{listed} of the clearest features beat every permuted pair")
    return Decision("inconclusive", f"{listed} of the clearest features beat every permuted pair")


def _induction(row: Record) -> list[Record]:
    """The described features that are induction features."""
    return [feature for feature in row["features"] if feature["score"] >= INDUCTION]


def _readable(feature: Record) -> bool:
    return any(feature[side]["grain"] not in ("broad", "silent") for side in ("query", "before_key"))


def _beating(row: Record) -> int:
    return sum(f["share_text"] is not None and f["permuted_largest"] is not None and f["share_text"] > f["permuted_largest"]
               for f in _induction(row))  # fmt: skip
