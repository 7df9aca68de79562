import pytest
import torch

from crosshead.analysis import qk_patching
from crosshead.analysis.attention_metrics import evaluate as evaluate_any
from crosshead.analysis.evaluation import EvaluationConfig
from crosshead.analysis.qk_metrics import evaluate
from crosshead.analysis.qk_references import measure_references
from crosshead.attention.qk_diagonal import centred
from tests.analysis.qk import batches_of, trained

CONFIG = EvaluationConfig(detail_contexts=4, splice_contexts=2)


@pytest.fixture(scope="module")
def setup(tiny_model):
    model = tiny_model("llama")
    module, heldout = trained(model)
    return model, module, heldout


@torch.no_grad()
def test_errors_equal_those_of_plain_loops(setup):
    _, module, heldout = setup
    found = evaluate(module, heldout, CONFIG)
    error, size, kl, agree, n = 0.0, 0.0, 0.0, 0, 0
    for batch in heldout:
        predicted, true = module.scores(batch)[:, 0], module.true_scores(batch)[:, 0]
        for c in range(len(predicted)):
            for t in range(1, predicted.shape[1]):
                p, q = predicted[c, t, 1 : t + 1].double(), true[c, t, 1 : t + 1].double()
                error += float(((p - p.mean()) - (q - q.mean())).square().sum())
                size += float((q - q.mean()).square().sum())
                kl += float((q.softmax(0) * (q.log_softmax(0) - p.log_softmax(0))).sum())
                agree += int(p.argmax() == q.argmax())
                n += 1
    head = found.keys.per_head[0]
    assert head["normalised_mse"] == pytest.approx(error / size, rel=1e-5)
    assert head["kl"] == pytest.approx(kl / n, rel=1e-4)
    assert head["top1_agreement"] == pytest.approx(agree / n)
    assert found.normalised_mse == pytest.approx(sum(h["normalised_mse"] for h in found.keys.per_head) / 2)


def test_with_the_first_key_the_pattern_is_the_models_own(setup):
    """KL with the first key against the model's own attention pattern."""
    from crosshead.activations.capture import capture
    from crosshead.dictionaries.base import Site

    model, module, heldout = setup
    found, total, n = evaluate(module, heldout, CONFIG), 0.0, 0
    for batch in heldout:
        own = capture(model, batch.tokens, [Site(1, "pattern")])[Site(1, "pattern")][:, module.heads].double()
        predicted = module.scores(batch).double()
        upper = torch.ones(own.shape[-1], own.shape[-1], dtype=torch.bool).triu(1)
        ours = predicted.masked_fill(upper, -torch.inf).log_softmax(-1)
        total += float((own * (own.clamp(min=1e-30).log() - ours.masked_fill(upper, 0.0)))[:, :, 1:].sum())
        n += own[:, :, 1:].shape[0] * own.shape[1] * (own.shape[2] - 1)
    assert found.keys_with_first.kl == pytest.approx(total / n, rel=1e-3)


def test_pair_l0_counts_features_active_on_both_sides(setup):
    _, module, heldout = setup
    found, pairs, n = evaluate(module, heldout, CONFIG), 0, 0
    for batch in heldout:
        sides = module.sides(batch)
        on = [(x.codes.to_dense() != 0).view(*batch.mask.shape, -1) for x in sides[:2]]
        for c in range(len(batch.mask)):
            for t in range(1, batch.mask.shape[1]):
                for s in range(1, t + 1):
                    pairs += int((on[0][c, t] & on[1][c, s]).sum())
                    n += 1
    assert found.l0 == pytest.approx(pairs / n)
    assert found.l0_query == pytest.approx(8, rel=0.5)


def test_the_model_s_own_scores_make_no_error_and_change_no_cross_entropy(setup, monkeypatch):
    model, module, heldout = setup
    monkeypatch.setattr(module, "scores_of", lambda sides, batch, progress=1.0: module.true_scores(batch) + 3.0)
    found = evaluate_any(module, heldout, CONFIG, model=model)
    assert found.normalised_mse == pytest.approx(0.0, abs=1e-9)
    assert found.keys.top1_agreement == 1.0
    assert found.keys_with_first.kl == pytest.approx(0.0, abs=1e-6)
    assert found.patching.delta_ce == pytest.approx(0.0, abs=1e-4)
    assert found.patching.ce_recovered is None or found.patching.ce_recovered == pytest.approx(1.0, abs=0.05)


def test_patching_equals_replacing_the_pattern_by_hand(setup):
    """The cross-entropy of the model whose heads' outputs are recomputed from the predicted pattern."""
    from crosshead.activations.capture import capture
    from crosshead.dictionaries.base import Site

    model, module, heldout = setup
    found = evaluate(module, heldout, CONFIG.model_copy(update={"splice_contexts": 1}), model=model).patching
    batch = heldout[0]
    tokens = batch.tokens[:1]
    upper = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    predicted = module.scores(batch)[0].masked_fill(upper, -torch.inf).softmax(-1)
    sites = capture(model, tokens, [Site(1, "pattern"), Site(1, "v")])
    pattern, v = sites[Site(1, "pattern")][0].clone(), sites[Site(1, "v")][0].repeat_interleave(2, 0)
    pattern[module.heads, 1:] = predicted[:, 1:]
    z = (pattern @ v).transpose(0, 1).flatten(1)[None]
    attention = model.model.model.layers[1].self_attn
    handle = attention.o_proj.register_forward_pre_hook(lambda _, arguments: (z,))
    try:
        logits = model.model(tokens).logits
    finally:
        handle.remove()
    log_probabilities = logits[:, 1:-1].log_softmax(-1)
    expected = -log_probabilities.gather(-1, tokens[:, 2:, None]).mean()
    assert found.ce_patched == pytest.approx(float(expected), rel=1e-4)
    assert found.n_tokens == tokens.shape[1] - 2


def test_references_are_exact_with_all_dimensions(setup):
    model, module, heldout = setup
    width = module.dims.head_dim
    train = batches_of(model, module, 12, 3)
    found = {r.name: r for r in measure_references(module, train, heldout)}
    assert found[f"coordinates/{width}"].normalised_mse < 1e-6
    names = [f"svd/{rank}" for rank in (1, 2, 4, 8)]
    errors = [found[name].normalised_mse for name in names]
    assert errors == sorted(errors, reverse=True)
    assert found["mean-score"].normalised_mse > 0.3
    assert found["mean-query-key"].normalised_mse >= 0


def test_the_full_svd_is_the_form_itself(setup):
    from crosshead.analysis.qk_references import _Forms

    model, module, heldout = setup
    train = batches_of(model, module, 12, 3)
    forms = _Forms(module, train, torch.eye(module.dims.head_dim), False)
    batch = heldout[0]
    allowed = module.positions.allowed(batch.mask)
    full = centred(forms.scores(batch, module.dims.head_dim), allowed)
    torch.testing.assert_close(full, centred(module.true_scores(batch), allowed), rtol=1e-2, atol=1e-3)


def test_nothing_held_out_is_refused(setup):
    with pytest.raises(ValueError, match="no held-out positions"):
        evaluate(setup[1], [], CONFIG)


def test_a_cost_that_is_noise_recovers_nothing():
    assert qk_patching._recovered(1.0, 0.9995, 1.006) is None
    assert qk_patching._recovered(1.0, 1.01, 1.05) == pytest.approx(0.8)


def test_the_svd_s_pair_l0_counts_the_mean_query(setup):
    module, heldout = setup[1], setup[-1]
    found = {r.name: r.l0 for r in measure_references(module, heldout, heldout)}
    assert found["svd/4"] == 5
