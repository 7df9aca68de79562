import pytest
import torch

from crosshead.activations.capture import capture, layer_weights
from crosshead.activations.splice import splice
from crosshead.analysis import splicing
from crosshead.analysis.splicing import cross_entropy_recovered
from crosshead.dictionaries.base import Batch, Site
from crosshead.dictionaries.registry import build, config_class

CASES = {
    "attn_out_sae": {"kind": "attn_out_sae", "layers": [1]},
    "attn_out_sae-heads": {"kind": "attn_out_sae", "layers": [1], "per_head": True},
    "value_sae": {"kind": "value_sae", "layers": [0, 1]},
    "mtc": {"kind": "mtc", "layers": [1], "target": "resid_out"},
}


def setup(kind: str, model):
    tokens = torch.randint(1, 250, (6, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    config = config_class(CASES[kind]["kind"]).model_validate(
        CASES[kind] | {"features": 16, "sparsity": {"kind": "topk", "k": 4}}
    )
    module = build(config, model.dims)
    sites = (*module.sites, *module.start_sites)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 0] = False
    batches = [Batch(capture(model, chunk, sites), mask, chunk) for chunk in tokens.split(2)]
    module.train()
    module.start_(batches, {i: layer_weights(model, i) for i in (0, 1)}, torch.Generator().manual_seed(0))
    return module.eval(), batches


@pytest.mark.parametrize("kind", CASES)
def test_a_perfect_reconstruction_recovers_everything(kind, tiny_model, monkeypatch):
    module, batches = setup(kind, tiny_model("llama"))
    monkeypatch.setattr(module, "decode", lambda codes, batch: module.target(batch))
    result = cross_entropy_recovered(module, tiny_model("llama"), batches)
    assert result.ce_recovered == pytest.approx(1.0, abs=1e-3)
    assert result.kl == pytest.approx(0.0, abs=1e-5)
    assert result.delta_ce == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("kind", CASES)
def test_predicting_the_mean_recovers_nothing(kind, tiny_model, monkeypatch):
    module, batches = setup(kind, tiny_model("llama"))
    monkeypatch.setattr(module, "decode", lambda codes, batch: torch.zeros_like(module.target(batch)))
    result = cross_entropy_recovered(module, tiny_model("llama"), batches)
    assert result.ce_recovered == pytest.approx(0.0, abs=1e-6)
    assert result.ce_spliced == result.ce_mean


def test_clean_cross_entropy_is_the_models_own(tiny_model):
    model = tiny_model("llama")
    module, batches = setup("attn_out_sae", model)
    result = cross_entropy_recovered(module, model, batches)
    tokens = torch.cat([b.tokens for b in batches])
    with torch.no_grad():
        log_probabilities = model.model(tokens).logits[:, 1:-1].log_softmax(-1)
    own = -log_probabilities.gather(-1, tokens[:, 2:, None]).mean()
    assert result.ce_clean == pytest.approx(float(own), rel=1e-5)
    assert result.n_tokens == 6 * 14


def test_zero_ablation_is_the_model_without_that_attention_output(tiny_model):
    model = tiny_model("llama")
    module, batches = setup("attn_out_sae", model)
    result = cross_entropy_recovered(module, model, batches)

    def silence(_module, _arguments, output):
        out = output[0].clone()
        out[:, 1:] = 0
        return (out, *output[1:])

    handle = model.model.model.layers[1].self_attn.register_forward_hook(silence)
    try:
        tokens = torch.cat([b.tokens for b in batches])
        with torch.no_grad():
            log_probabilities = model.model(tokens).logits[:, 1:-1].log_softmax(-1)
    finally:
        handle.remove()
    silenced = -log_probabilities.gather(-1, tokens[:, 2:, None]).mean()
    assert result.ce_zero == pytest.approx(float(silenced), rel=1e-5)
    assert result.ce_recovered_zero == pytest.approx(
        (result.ce_zero - result.ce_spliced) / (result.ce_zero - result.ce_clean)
    )
    assert Site(1, "attn_out") in module.target_sites


@pytest.mark.parametrize("kind", CASES)
def test_remembered_ablations_change_no_figure_and_are_not_run_again(kind, tiny_model, monkeypatch):
    model = tiny_model("llama")
    module, batches = setup(kind, model)
    ablated = {}
    first = cross_entropy_recovered(module, model, batches, ablated)
    assert len(ablated) == 2 * len(batches)
    passes = []
    monkeypatch.setattr(splicing, "splice", lambda *a, **k: passes.append(1) or splice(*a, **k))
    assert cross_entropy_recovered(module, model, batches, ablated) == first
    assert len(passes) == len(batches)
    other = Batch(batches[0].sites, batches[0].mask, batches[0].tokens.roll(1, 0))
    cross_entropy_recovered(module, model, [other], ablated)
    assert len(ablated) == 2 * len(batches) + 2
