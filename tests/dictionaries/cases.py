"""Every registered architecture in several forms, and random batches that fit them."""

from dataclasses import replace

import torch

from crosshead.dictionaries.base import Batch, LayerWeights, ModelDims, Site
from crosshead.dictionaries.registry import config_class
from crosshead.maths.patterns import AttentionSpec, attention_patterns

DIMS = ModelDims(d_model=12, n_heads=4, n_kv_heads=2, head_dim=5, n_layers=6)
LAYERS = (2, 4)
SPARSITIES = {
    "l1": {"kind": "l1", "coefficient": 0.05, "negative_coefficient": 0.01, "start_l0": 8.0},
    "topk": {"kind": "topk", "k": 5},
    "batch_topk": {"kind": "batch_topk", "k": 5},
    "jumprelu": {"kind": "jumprelu", "coefficient": 0.05, "negative_coefficient": 0.01, "start_l0": 8.0},
}
BASES = {
    "mtc": {"kind": "mtc", "layers": [2]},
    "mtc-resid": {"kind": "mtc", "layers": [2], "target": "resid_out", "input": "resid"},
    "mtc-top1": {"kind": "mtc", "layers": [2], "heads_per_feature": 1},
    "mtc-top2-nonnegative": {"kind": "mtc", "layers": [2], "heads_per_feature": 2, "loadings_sign": "nonnegative"},
    "mtc-fixed-l2": {
        "kind": "mtc",
        "layers": [2],
        "heads_per_feature": 1,
        "assignment": "fixed",
        "loadings_penalty": "l2",
    },
    "mtc-random-l1": {"kind": "mtc", "layers": [2], "start": "random", "loadings_penalty": "l1"},
    "mtc-energy": {"kind": "mtc", "layers": [2], "start_tokens": "energy"},
    "joint_mtc": {"kind": "joint_mtc", "layers": [2], "heads_per_feature": 1},
    "joint_mtc-all": {"kind": "joint_mtc", "layers": [2], "loadings_sign": "nonnegative"},
    "joint_mtc-resid": {
        "kind": "joint_mtc",
        "layers": [2],
        "target": "resid_out",
        "input": "resid",
        "heads_per_feature": 2,
    },
    "sae_best_head": {"kind": "sae_best_head", "layers": [2]},
    "sae_best_head-resid": {"kind": "sae_best_head", "layers": [2], "input": "resid"},
    "value_sae-one": {"kind": "value_sae", "layers": [4]},
    "value_sae-two": {"kind": "value_sae", "layers": [2, 4]},
    "value_sae-whole": {"kind": "value_sae", "layers": [2, 4], "norm": "whole"},
    "attn_out_sae": {"kind": "attn_out_sae", "layers": [2]},
    "attn_out_sae-heads": {"kind": "attn_out_sae", "layers": [2], "per_head": True},
}
CASES = {f"{name}/{form}": base | {"features": 24, "sparsity": sparsity}
         for name, base in BASES.items() for form, sparsity in SPARSITIES.items()}  # fmt: skip


def config_of(case: str, **sparsity: float):
    """The config of a case, with other parameters of its sparsity."""
    fields = CASES[case] | {"sparsity": CASES[case]["sparsity"] | sparsity}
    return config_class(fields["kind"]).model_validate(fields)


def weights(seed: int = 0) -> dict[int, LayerWeights]:
    generator = torch.Generator().manual_seed(seed)
    shape = (DIMS.n_heads, DIMS.head_dim, DIMS.d_model)
    return {layer: LayerWeights(torch.randn(shape, generator=generator), torch.randn(12, generator=generator))
            for layer in LAYERS}  # fmt: skip


def random_batch(seed: int, n_contexts: int = 3, n_positions: int = 9) -> Batch:
    """Activations of an invented model: patterns come from q and k, values and targets are linear in the residual."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(n_contexts, *shape, generator=generator)

    spec = AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=5, scale=1.0)
    maps = torch.Generator().manual_seed(7)
    sites: dict[Site, torch.Tensor] = {}
    for layer in LAYERS:
        x = draw(n_positions, DIMS.d_model)
        to_value = torch.randn(DIMS.d_model, 10, generator=maps)
        v = (x @ to_value).unflatten(-1, (2, 5)).transpose(1, 2)
        pattern = attention_patterns(draw(4, n_positions, 5), draw(2, n_positions, 5), spec)
        layer_weights = weights()[layer]
        z = pattern @ v.repeat_interleave(2, dim=1)
        attn_out = torch.einsum("bhte,hed->btd", z, layer_weights.W_O) + layer_weights.b_O
        sites |= {Site(layer, "resid_in"): x, Site(layer, "v"): v, Site(layer, "pattern"): pattern,
                  Site(layer, "attn_out"): attn_out, Site(layer, "resid_out"): x + attn_out}  # fmt: skip
    mask = torch.ones(n_contexts, n_positions, dtype=torch.bool)
    mask[:, 0] = False
    tokens = torch.randint(1, 50, (n_contexts, n_positions), generator=generator)
    return Batch(sites, mask, tokens)


def padded_batch(seed: int) -> Batch:
    """A random batch that counts not everywhere: a tail, a hole and one whole context are masked as padding is."""
    batch = random_batch(seed, n_contexts=4)
    mask = batch.mask.clone()
    mask[0, 6:] = False
    mask[1, 3:5] = False
    mask[3] = False
    return replace(batch, mask=mask)
