import pytest
import torch
from transformers import AutoModelForCausalLM

from crosshead.activations.capture import capture, layer_weights
from crosshead.analysis.audit import _activations, audit_runs
from crosshead.dictionaries.base import Batch, Site
from crosshead.dictionaries.registry import build, config_class
from tests.dictionaries.cases import SPARSITIES

ARCHITECTURES = {
    "mtc": {"kind": "mtc", "layers": [1]},
    "mtc-resid": {"kind": "mtc", "layers": [1], "target": "resid_out", "input": "resid", "loadings_penalty": "l1"},
    "mtc-top2": {"kind": "mtc", "layers": [1], "heads_per_feature": 2, "loadings_penalty": "l2"},
    "mtc-fixed": {"kind": "mtc", "layers": [1], "heads_per_feature": 1, "assignment": "fixed"},
    "joint_mtc": {"kind": "joint_mtc", "layers": [1], "heads_per_feature": 1},
    "joint_mtc-all": {
        "kind": "joint_mtc", "layers": [1], "target": "resid_out", "input": "resid", "heads_per_feature": "all",
    },
    "sae_best_head": {"kind": "sae_best_head", "layers": [1]},
    "sae_best_head-resid": {"kind": "sae_best_head", "layers": [1], "input": "resid"},
    "value_sae": {"kind": "value_sae", "layers": [0, 1]},
    "value_sae-whole": {"kind": "value_sae", "layers": [0, 1], "norm": "whole"},
    "attn_out_sae": {"kind": "attn_out_sae", "layers": [1]},
    "attn_out_sae-heads": {"kind": "attn_out_sae", "layers": [1], "per_head": True},
}  # fmt: skip


def batch_of(model, tokens, sites) -> Batch:
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(capture(model, tokens, sites), mask, tokens)


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_the_audit_agrees_with_the_dictionaries_own_arithmetic(sparsity, tiny_model, tiny_model_directory, tmp_path):
    model = tiny_model("llama")
    tokens = torch.randint(1, 250, (12, 20), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    weights = {layer: layer_weights(model, layer) for layer in (0, 1)}
    expected, directories = {}, {}
    for name, description in ARCHITECTURES.items():
        config = config_class(description["kind"]).model_validate(
            description | {"features": 40, "sparsity": SPARSITIES[sparsity]}
        )
        module = build(config, model.dims)
        batches = [batch_of(model, chunk, (*module.sites, *module.start_sites)) for chunk in tokens.split(4)]
        module.train()
        module.start_(batches, weights, torch.Generator().manual_seed(1))
        module.calibrate_(batches)
        module.eval()
        squared = variance = 0.0
        with torch.no_grad():
            for batch in batches:
                target = module.target(batch)[batch.mask].double()
                squared += float((module.decode(module.encode(batch), batch)[batch.mask] - target).square().sum())
                variance += float(target.square().sum())
        expected[name] = squared / variance
        directories[name] = tmp_path / name
        module.save(directories[name])
    audited = audit_runs(directories, tiny_model_directory("llama"), tokens)
    assert {name: found.normalised_mse for name, found in audited.items()} == pytest.approx(expected, abs=1e-4)


def test_a_fused_value_projection_leaves_value_saes_out_with_a_reason_and_audits_the_rest(
    tiny_model, tiny_model_directory, tmp_path
):
    model, directories = tiny_model("gpt2"), {}
    tokens = torch.randint(1, 250, (4, 12), generator=torch.Generator().manual_seed(0))
    for kind in ("value_sae", "attn_out_sae"):
        config = config_class(kind).model_validate(
            {"kind": kind, "layers": [1], "features": 8, "sparsity": {"kind": "topk", "k": 2}}
        )
        module = build(config, model.dims)
        module.start_([batch_of(model, tokens, module.sites)], {}, torch.Generator().manual_seed(0))
        module.save(tmp_path / kind)
        directories[kind] = tmp_path / kind
    audited = audit_runs(directories, tiny_model_directory("gpt2"), tokens)
    assert audited["value_sae"].normalised_mse is None
    assert "one product with queries and keys" in audited["value_sae"].reason
    assert audited["attn_out_sae"].normalised_mse > 0


def test_the_last_layers_residual_stream_is_taken_before_the_final_norm(tiny_model, tiny_model_directory):
    model = tiny_model("llama")
    tokens = torch.randint(1, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    last = model.dims.n_layers - 1
    stock = AutoModelForCausalLM.from_pretrained(tiny_model_directory("llama"), attn_implementation="eager")
    (seen,) = list(_activations(stock.eval(), tokens, [last], 2))
    own = capture(model, tokens, [Site(last, "resid_out")])[Site(last, "resid_out")]
    assert (seen[f"{last}.resid_out"] - own).abs().max() < 1e-4
