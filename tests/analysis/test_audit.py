import pytest
import torch

from crosshead.activations.capture import capture, layer_weights
from crosshead.analysis.audit import audit_runs
from crosshead.dictionaries.base import Batch
from crosshead.dictionaries.registry import build, config_class
from tests.dictionaries.cases import SPARSITIES

ARCHITECTURES = {
    "mtc": {"kind": "mtc", "layers": [1]},
    "mtc-resid": {"kind": "mtc", "layers": [1], "target": "resid_out", "input": "resid", "loadings_penalty": "l1"},
    "mtc-top2": {"kind": "mtc", "layers": [1], "heads_per_feature": 2, "loadings_penalty": "l2"},
    "mtc-fixed": {"kind": "mtc", "layers": [1], "heads_per_feature": 1, "assignment": "fixed"},
    "value_sae": {"kind": "value_sae", "layers": [0, 1]},
    "value_sae-whole": {"kind": "value_sae", "layers": [0, 1], "norm": "whole"},
    "attn_out_sae": {"kind": "attn_out_sae", "layers": [1]},
    "attn_out_sae-heads": {"kind": "attn_out_sae", "layers": [1], "per_head": True},
}


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
    assert audited == pytest.approx(expected, abs=1e-4)


def test_a_fused_value_projection_is_refused_for_value_saes(tiny_model, tiny_model_directory, tmp_path):
    model = tiny_model("gpt2")
    config = config_class("value_sae").model_validate(
        {"kind": "value_sae", "layers": [1], "features": 8, "sparsity": {"kind": "topk", "k": 2}}
    )
    build(config, model.dims).save(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no v_proj \(fused projections\)"):
        audit_runs({"run": tmp_path / "run"}, tiny_model_directory("gpt2"), torch.zeros(1, 5, dtype=torch.long))
