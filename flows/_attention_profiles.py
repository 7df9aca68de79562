"""Attention models in the evidence and gpu profiles: the laptop's runs at three seeds, or larger."""

import re
from collections.abc import Sequence
from typing import Any

__all__ = ["evidence_attention_", "gpu_attention_"]

Sections = dict[str, Any]

_EVERY_SEED: dict[str, tuple[tuple[int, ...], Sections]] = {
    "qk-rank1": ((4, 8, 16, 32, 64), {}),
    "qk-features512": ((8, 16, 32, 64), {"features": 512}),
    "qk-rank16": ((2, 4, 8, 16), {"rank": 16}),
    "qk-heads": ((8, 16, 32), {"heads": "all", "base": "mean", "features": 512}),
}
_POSITIONAL: Sections = {"heads": [1]}
"""A head of the default model that looks at positions; the usual one, an induction head, looks at content."""
_FIRST_SEED: dict[str, tuple[tuple[int, ...], Sections]] = {
    "qk-rank2": ((8,), {"rank": 2}),
    "qk-rank4": ((8,), {"rank": 4}),
    "qk-rank8": ((8,), {"rank": 8}),
    "qk-content": ((32,), {"position": "content"}),
    "qk-rotated": ((32,), {"position": "rotated"}),
    "qk-resid": ((32,), {"input": "resid"}),
    "qk-head1": ((32,), _POSITIONAL),
    "qk-head1-content": ((32,), _POSITIONAL | {"position": "content"}),
    "qk-head1-rotated": ((32,), _POSITIONAL | {"position": "rotated"}),
}
_QK_L1 = {"a": 0.2, "b": 0.1, "c": 0.03, "d": 0.01}
"""Coefficients."""
_QK_JUMPRELU = (8, 16, 32, 64)
"""Active features at the start: its thresholds hardly move in so few steps."""
_RANK_ONE: Sections = {
    "kind": "replacement", "series": "arl-rank1", "family": "attention-replacement", "layers": ["first"],
    "features": 256, "head_dim": 8, "variant": {"kind": "rank_one", "groups": 32, "active": 32},
}  # fmt: skip
_SPARSE: Sections = {"lambda_qk": 0.02, "lambda_ov": 0.03, "gates": {"coefficient": 0.1},
                     "pattern": {"kind": "entropy", "coefficient": 1.0}}  # fmt: skip
"""Every penalty that a replacement layer has, each a few hundredths of the squared error at the start."""


def evidence_attention_(sections: Sections, seeds: Sequence[int]) -> None:
    """What a claim is judged by at the seeds, in place; variants of it at one."""
    first = seeds[0]
    laptop = sections["attention_runs"] | {"arl-rank1": _RANK_ONE}
    base = {"start": "base_qk"}
    laptop["arl-wide-base"] = laptop["arl-wide"] | {"series": "arl-wide-base"} | base
    laptop["arl-sparse"] = laptop["arl-wide"] | {"series": "arl-sparse"} | _SPARSE
    laptop["arl-narrow-base"] = laptop["arl-narrow"] | {"series": "arl-narrow-base"} | base
    runs: Sections = {}
    for seed in seeds:
        for series, (ks, own) in (_EVERY_SEED | (_FIRST_SEED if seed == first else {})).items():
            for k in ks:
                runs[f"{series}-k{k}-s{seed}"] = _qk(series, seed, {"kind": "batch_topk", "k": k}, own)
        once = () if seed != first else ("arl-rank1", "arl-combined", "arl-wide-base", "arl-narrow-base", "arl-sparse")
        for name in ("arl-wide", "arl-narrow", *once):
            runs[f"{name}-s{seed}"] = laptop[name] | {"seed": seed}
    for name, coefficient in _QK_L1.items():
        sparsity = {"kind": "l1", "coefficient": coefficient, "start_l0": 40}
        runs[f"qk-l1-{name}-s{first}"] = _qk("qk-l1", first, sparsity, {})
    for start in _QK_JUMPRELU:
        sparsity = {"kind": "jumprelu", "coefficient": 0.03, "start_l0": start}
        runs[f"qk-jumprelu-{start}-s{first}"] = _qk("qk-jumprelu", first, sparsity, {})
    sections["attention_runs"] = runs
    explain = sections["explain"]
    explain["runs"] = [f"qk-rank1-k32-s{first}", *(f"qk-features512-k32-s{seed}" for seed in seeds)]
    explain["decisions"] = [decision | {"run": f"qk-rank1-k32-s{first}"} for decision in explain["decisions"]]
    coded = [f"{name}-s{first}" for name in ("arl-rank1", *sections["replacements"]["codes_of"])]
    wide = [f"arl-wide-s{seed}" for seed in seeds]
    sections["replacements"] |= {"heads_of": wide, "codes_of": [*coded, f"arl-sparse-s{first}"]}


def _qk(series: str, seed: int, sparsity: Sections, own: Sections) -> Sections:
    return {"kind": "qk_diagonal", "series": series, "family": "qk-diagonalization", "layers": ["first"], "seed": seed,
            "sparsity": sparsity, **own}  # fmt: skip


def gpu_attention_(sections: Sections) -> None:
    """Replacement layers of 1,024 heads, eight times the QK features, twenty times the steps, in place."""
    for defaults in sections["attention_models"].values():
        defaults["training"] = {"steps": 4000, "learning_rate": 2e-3, "autocast": "none"}
    sections["attention_models"]["qk_diagonal"]["features"] = 1024
    sections["attention_models"]["replacement"]["patterns_mib"] = 1024.0
    sections["attention_runs"]["arl-rank1"] = dict(_RANK_ONE)
    for name, run in sections["attention_runs"].items():
        if "features" in run and name != "arl-narrow":
            run["features"] = 1024 if name == "arl-wide" else 4 * run["features"]
    sections["attention_runs"] = {
        _four_times(name): run | {"series": _four_times(run["series"])}
        for name, run in sections["attention_runs"].items()
    }
    sections["explain"]["runs"] = [_four_times(name) for name in sections["explain"]["runs"]]
    sections["attention_evaluation"] |= {"splice_contexts": 32}


def _four_times(name: str) -> str:
    """A name that tells how many features a run has, for four times as many."""
    return re.sub(r"features(\d+)", lambda found: f"features{4 * int(found[1])}", name)
