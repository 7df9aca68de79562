"""Tiny layers whose scores are real queries and keys of a rotary model, for the tests of this folder."""

from typing import Any

import torch

from crosshead.attention.qk_diagonal import Config, Module
from crosshead.dictionaries.base import Batch, ModelDims, Site
from crosshead.maths.patterns import AttentionSpec

DIMS = ModelDims(d_model=14, n_heads=4, n_kv_heads=2, head_dim=6, n_layers=3)
LENGTH = 12
SPARSITIES: dict[str, dict[str, Any]] = {
    "l1": {"kind": "l1", "coefficient": 0.01, "negative_coefficient": 0.002, "start_l0": 6.0},
    "topk": {"kind": "topk", "k": 5},
    "batch_topk": {"kind": "batch_topk", "k": 5},
    "jumprelu": {"kind": "jumprelu", "coefficient": 0.01, "negative_coefficient": 0.002, "start_l0": 6.0},
}
BASES: dict[str, dict[str, Any]] = {
    "one-head": {"heads": [2]},
    "all-heads": {},
    "two-heads-rank3": {"heads": [1, 2], "rank": 3},
    "content": {"heads": [0], "position": "content"},
    "content-rank2": {"heads": [0, 3], "position": "content", "rank": 2},
    "rotated": {"heads": [3], "position": "rotated", "target": "scores"},
    "two-frequencies": {"heads": [0], "kernel_frequencies": 2, "target": "pattern"},
    "resid-mean": {"heads": [1], "input": "resid", "base": "mean"},
}
_FORMS = [("one-head", form) for form in SPARSITIES] + [("two-heads-rank3", "jumprelu"), ("all-heads", "l1")]
_FORMS += [(name, "batch_topk") for name in BASES if name not in ("one-head", "all-heads")] + [("content", "topk")]
CASES = {f"{name}/{form}": BASES[name] | {"layers": [1], "features": 20, "sparsity": SPARSITIES[form]}
         for name, form in _FORMS}  # fmt: skip


def spec(**changes: Any) -> AttentionSpec:
    fields = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "scale": 0.5, "rotary": "rotary.1"}
    return AttentionSpec.model_validate(fields | changes)


def tables(length: int = LENGTH, rotated: int = 6, interleaved: bool = False, factor: float = 1.0):
    angle = torch.arange(length)[:, None] * torch.tensor([1.0, 0.4, 0.1])[: rotated // 2]
    columns = (x.repeat_interleave(2, 1) if interleaved else torch.cat([x, x], 1) for x in (angle.cos(), angle.sin()))
    cos, sin = (factor * x for x in columns)
    return cos, sin


def random_batch(seed: int, n_contexts: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_contexts, LENGTH, 14, generator=generator)
    maps = torch.Generator().manual_seed(7)
    to_q, to_k = torch.randn(14, 24, generator=maps) / 3, torch.randn(14, 12, generator=maps) / 3
    q = (x @ to_q + 0.3).unflatten(-1, (4, 6)).transpose(1, 2)
    k = (x @ to_k - 0.2).unflatten(-1, (2, 6)).transpose(1, 2)
    mask = torch.ones(n_contexts, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    tokens = torch.randint(1, 50, (n_contexts, LENGTH), generator=generator)
    return Batch({Site(1, "q"): q, Site(1, "k"): k, Site(1, "resid_in"): x}, mask, tokens)


def build(case: dict[str, Any], attention: AttentionSpec | None = None) -> Module:
    module = Module(Config.model_validate(case), DIMS)
    module.use_attention_(attention or spec(), tables())
    return module


def started(case: dict[str, Any], n_batches: int = 6) -> tuple[Module, list[Batch]]:
    module, batches = build(case), [random_batch(seed) for seed in range(n_batches)]
    module.train()
    module.start_(batches, {}, torch.Generator().manual_seed(0))
    return module, batches
