"""Replacement layers in all their forms, and batches that fit them."""

from dataclasses import replace
from typing import Any

import torch

from crosshead.attention.replacement import Config, Module
from crosshead.dictionaries.base import Batch, ModelDims, Site
from crosshead.maths.patterns import AttentionSpec, attention_patterns, expand_kv

DIMS = ModelDims(d_model=12, n_heads=4, n_kv_heads=2, head_dim=6, n_layers=3)
LAYER = 1
SPEC = AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=6, scale=6**-0.5, rotary="rotary.1")

CASES: dict[str, dict[str, Any]] = {
    "plain": {"features": 8, "head_dim": 2},
    "plain-base": {"features": 10, "head_dim": 4, "start": "base_qk"},
    "plain-nuclear": {"features": 8, "head_dim": 4, "lambda_qk": 0.1, "lambda_ov": 0.2},
    "plain-entropy": {"features": 8, "head_dim": 2, "pattern": {"kind": "entropy", "coefficient": 0.5}},
    "plain-power": {"features": 8, "head_dim": 2, "pattern": {"kind": "power", "coefficient": 0.5, "p": 0.5}},
    "plain-gates": {"features": 8, "head_dim": 2, "gates": {"coefficient": 0.1}},
    "rank_one": {"features": 12, "head_dim": 4, "variant": {"kind": "rank_one", "groups": 4, "active": 5}},
    "rank_one-gates": {
        "features": 12, "head_dim": 4, "variant": {"kind": "rank_one", "groups": 4, "active": 5},
        "gates": {"coefficient": 0.1}, "pattern": {"kind": "entropy", "coefficient": 0.5}, "lambda_ov": 0.1,
    },
    "combined": {
        "features": 24, "head_dim": 6,
        "variant": {"kind": "combined", "groups": 4, "qk_active": 3, "sparsity": {"kind": "batch_topk", "k": 5}},
    },
    "combined-l1": {
        "features": 24, "head_dim": 6, "lambda_qk": 0.1, "lambda_ov": 0.1, "gates": {"coefficient": 0.1},
        "variant": {"kind": "combined", "groups": 4, "qk_active": 6, "sparsity":
                    {"kind": "l1", "coefficient": 0.05, "negative_coefficient": 0.01, "start_l0": 8.0}},
    },
}  # fmt: skip


def tables(length: int = 32, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary tables, columns f0 f1 .. f0 f1 .. as of Llama."""
    frequency = 10.0 ** -torch.arange(0, 1, 2 / width)
    angle = torch.arange(length).float()[:, None] * torch.cat([frequency, frequency])
    return angle.cos(), angle.sin()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Llama's rotary embedding."""
    cos, sin = (table[: x.shape[-2]] for table in tables(x.shape[-2], x.shape[-1]))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def random_batch(seed: int, n_contexts: int = 3, n_positions: int = 9) -> Batch:
    """An invented layer with an rms norm: q, k and v are linear in the normed residual, q and k are rotated."""
    fixed, generator = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    d, heads = DIMS.d_model, {"q": DIMS.n_heads, "k": DIMS.n_kv_heads, "v": DIMS.n_kv_heads}
    maps = {name: torch.randn(d, n * DIMS.head_dim, generator=fixed) * 0.4 for name, n in heads.items()}
    out = torch.randn(DIMS.n_heads * DIMS.head_dim, d, generator=fixed)
    bos = torch.randn(d, generator=fixed) * 5
    x = torch.randn(n_contexts, n_positions, d, generator=generator) + 0.3
    x[:, 0] = bos
    normed = x / x.square().mean(-1, keepdim=True).sqrt()
    q, k, v = ((normed @ maps[name]).unflatten(-1, (n, -1)).transpose(1, 2) for name, n in heads.items())
    q, k = rotated(q), rotated(k)
    pattern = attention_patterns(q, k, SPEC)
    z = pattern @ expand_kv(v, DIMS.n_heads)
    sites = {"resid_in": x, "q": q, "k": k, "v": v, "pattern": pattern, "attn_out": z.transpose(1, 2).flatten(2) @ out}
    tokens = torch.randint(1, 50, (n_contexts, n_positions), generator=generator)
    tokens[:, 0] = 0
    mask = torch.ones(n_contexts, n_positions, dtype=torch.bool)
    mask[:, 0] = False
    return Batch({Site(LAYER, name): tensor for name, tensor in sites.items()}, mask, tokens)


def padded_batch(seed: int) -> Batch:
    """A batch whose last positions do not count."""
    batch = random_batch(seed)
    mask = batch.mask.clone()
    mask[0, 6:] = False
    mask[1, 8:] = False
    return replace(batch, mask=mask)


def config_of(case: str, **changes: Any) -> Config:
    """The config of a case."""
    return Config.model_validate({"kind": "replacement", "layers": [LAYER], **CASES[case], **changes})


def started(case: str, n_batches: int = 4, **changes: Any) -> tuple[Module, list[Batch]]:
    """A started layer in training mode, and the batches it was started from."""
    module = Module(config_of(case, **changes), DIMS)
    module.use_attention_(SPEC, tables())
    batches = [random_batch(seed) for seed in range(n_batches)]
    module.train()
    module.start_(batches, {}, torch.Generator().manual_seed(0))
    return module, batches
