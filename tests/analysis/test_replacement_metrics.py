"""Figures of replacement layers against brute force and closed forms."""

import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.capture import attention_specs, capture, rotary_tables
from crosshead.analysis import replacement_metrics
from crosshead.analysis.attention_metrics import evaluate
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.replacement_metrics import effective_ranks
from crosshead.attention.replacement import Config, Module
from crosshead.dictionaries.base import Batch, Site
from tests.attention.replacements import CASES, padded_batch, random_batch, started


@pytest.mark.parametrize("case", CASES)
def test_figures_are_sums_over_counted_positions(case):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval()
    heldout = [padded_batch(20), random_batch(21)]
    found = evaluate(module, heldout, EvaluationConfig())
    error = variance = active = 0.0
    counts = torch.zeros(module.config.features, dtype=torch.long)
    for batch in heldout:
        target = module.target(batch)[batch.mask]
        z = module.encode(batch)
        error += float((module.decode(z, batch)[batch.mask] - target).square().sum())
        variance += float(target.square().sum())
        out = module.out.unflatten(0, (module.config.features, -1))
        written = torch.einsum("nuw,uwd->nud", z.unflatten(1, (module.config.features, -1)), out).norm(dim=-1)
        on = written[batch.mask.flatten()] > 0.01 * target.norm(dim=1, keepdim=True)
        counts += on.sum(0)
        active += float(on.sum())
    assert found.normalised_mse == pytest.approx(error / variance, rel=1e-5)
    assert found.l0 == pytest.approx(active / found.n_tokens)
    assert found.n_tokens == sum(b.n_counted for b in heldout)
    assert found.head_counts == counts.tolist()
    assert found.heads_alive == int((counts > 0).sum())
    groups, per_group = module.config.groups, module.config.features // module.config.groups
    entropies = torch.zeros(groups)
    for batch in heldout:
        pattern = module.patterns(batch, slice(0, groups))
        logs = pattern.clamp(min=1e-30).log()
        entropies += (-(pattern * logs).sum(-1) * batch.mask[:, None]).sum((0, 2)) / found.n_tokens
    live = (counts > 0).view(groups, per_group).any(1)
    assert found.pattern_entropy.mean == pytest.approx(float(entropies[live].mean()), rel=1e-4)


def test_effective_rank_counts_equal_singular_values_and_ignores_factors():
    module, _ = started("plain-nuclear", features=2, head_dim=4)
    with torch.no_grad():
        module.query.copy_(torch.eye(12)[:4])
        module.key.copy_(torch.eye(12)[4:8] * 3)
        module.query[1, 2:] = 0  # two singular values left
        module.value.copy_(torch.randn(8, 12))
        module.out[:4] = torch.randn(12)  # four equal rows: rank one
        left, right = torch.linalg.qr(torch.randn(4, 4)).Q, torch.linalg.qr(torch.randn(4, 4)).Q
        module.value[4:] = left @ torch.eye(12)[:4]
        module.out[4:] = left @ torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])) @ right @ torch.eye(12)[:4]
    qk, ov = effective_ranks(module)
    assert_close(qk, torch.tensor([4.0, 2.0], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert_close(ov, torch.tensor([1.0, 3.0], dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_a_layer_that_gives_the_base_layers_output_recovers_its_cross_entropy(tiny_model, monkeypatch):
    model, layer = tiny_model("llama"), 1
    tokens = torch.randint(1, 250, (3, 16), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    mask = tokens > 0
    sites = [Site(layer, name) for name in ("resid_in", "attn_out")]
    batch = Batch(capture(model, tokens, sites), mask, tokens)
    module = Module(Config(layers=(layer,), features=4, head_dim=2), model.dims)
    module.use_attention_(attention_specs(model, [layer])[layer], rotary_tables(model, layer, 16))
    module.start_([batch], {}, torch.Generator().manual_seed(0))
    module.eval()
    config = EvaluationConfig(splice_contexts=2)
    poor = evaluate(module, [batch], config, model=model)
    assert poor.splicing.n_tokens == 2 * 14
    monkeypatch.setattr(module, "decode", lambda z, b: module.target(b))
    assert evaluate(module, [batch], config, model=model).ce_recovered == pytest.approx(1.0, abs=1e-3)
    assert poor.ce_recovered != pytest.approx(1.0, abs=1e-3)
    assert evaluate(module, [batch], config).splicing is None


def test_arguments_that_it_does_not_have_are_refused():
    with pytest.raises(TypeError, match="modle"):
        replacement_metrics.evaluate(None, [], EvaluationConfig(), modle=None)  # pyright: ignore
