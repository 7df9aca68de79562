"""Conformance of QK diagonalizations in every form, as of dictionaries, and what is their own."""

import pytest
import torch
from torch.testing import assert_close

from crosshead.attention.qk_diagonal import Config, Module, centred
from crosshead.attention.registry import KINDS, config_class, load_attention_model
from crosshead.attention.registry import build as build_kind
from crosshead.dictionaries.base import Batch
from crosshead.maths.engine import Engine
from tests.attention.cases import CASES, DIMS, LENGTH, build, random_batch, spec, started, tables

every_case = pytest.mark.parametrize("case", CASES)


def changed(batch: Batch, where_BT: torch.Tensor) -> Batch:
    sites = {}
    for site, tensor in batch.sites.items():
        tensor = tensor.clone()
        places = tensor.transpose(1, 2) if tensor.dim() == 4 else tensor
        places[where_BT] = torch.randn_like(places[where_BT]) * 10
        sites[site] = tensor
    return Batch(sites, batch.mask, batch.tokens)


@every_case
def test_gradients_reach_every_parameter_and_groups_hold_each_once(case):
    module, batches = started(CASES[case])
    for batch in batches:
        module.loss(batch, 0.5).total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    grouped = [id(p) for group in module.parameter_groups() for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())


@every_case
def test_masked_positions_have_no_influence_but_the_first_key_s(case):
    module, batches = started(CASES[case])
    module.calibrate_(batches)
    module.eval()
    batch = random_batch(0)
    mask = batch.mask.clone()
    mask[0, 8:], mask[2] = False, False
    batch = Batch(batch.sites, mask, batch.tokens)
    hidden = ~mask
    hidden[:, 0] = False  # the first key's own score is part of the target
    other = changed(batch, hidden)
    results = []
    for one in (batch, other):
        loss = module.loss(one, 0.5)
        results.append([loss.total, loss.normalised_mse, *torch.autograd.grad(loss.total, list(module.parameters()))])
        assert mask.flatten()[module.sides(one).query.codes.rows].all()
    assert_close(results[1], results[0])


@every_case
def test_a_later_token_never_changes_an_earlier_score(case):
    module, batches = started(CASES[case])
    module.calibrate_(batches)
    module.eval()
    batch = batches[0]
    later = changed(batch, torch.arange(LENGTH).expand_as(batch.mask) >= 8)
    before, after = module.scores(batch), module.scores(later)
    assert_close(after[:, :, :8, :8], before[:, :, :8, :8])
    assert not torch.equal(after, before)


@every_case
def test_save_and_load_are_exact(case, tmp_path):
    module, batches = started(CASES[case])
    module.calibrate_(batches)
    module.eval()
    module.save(tmp_path / "model")
    loaded = load_attention_model(tmp_path / "model")
    assert loaded.config == module.config
    assert loaded.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(loaded.scores(batches[0]), module.scores(batches[0]))


@every_case
def test_a_tiny_batch_is_overfitted(case):
    settings = CASES[case] | {"features": 40, "target": "scores"}
    weak = {"coefficient": 1e-4, "negative_coefficient": 1e-4, "start_l0": 12.0}
    settings["sparsity"] = settings["sparsity"] | (weak if "coefficient" in settings["sparsity"] else {"k": 12})
    module, _ = started(settings)
    batch, steps = random_batch(0, 1), 60
    groups = [{"params": g.parameters, "lr": 1e-2 * min(g.multiplier, 5.0)} for g in module.parameter_groups()]
    optimiser = torch.optim.Adam(groups)
    before = module.loss(batch).normalised_mse
    for step in range(steps):
        optimiser.zero_grad()
        module.loss(batch, step / steps).total.backward()
        optimiser.step()
        module.project_()
    assert module.loss(batch).normalised_mse < min(0.35 * before, 0.25)


@every_case
def test_equal_seeds_start_equally(case):
    first, second = started(CASES[case])[0].state_dict(), started(CASES[case])[0].state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@every_case
def test_the_start_is_better_than_nothing_and_the_gauge_holds(case):
    module, batches = started(CASES[case])
    assert module.loss(batches[0]).normalised_mse < 1.0
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.project_()
    for name, parameter in module.named_parameters():
        assert_close(parameter.detach(), before[name])
    with torch.no_grad():
        module.query_encoder.weight.mul_(3.0)
        module.kernel.mul_(0.5)
    module.project_()
    assert_close(module.query_encoder.weight.detach(), before["query_encoder.weight"])
    assert_close(module.kernel.detach(), before["kernel"])


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("topk")])
def test_scores_are_sums_over_features_with_dense_products_too(case):
    module, batches = started(CASES[case])
    module.eval()
    sparse = module.scores(batches[0])
    module.engine = Engine(form="dense")
    assert_close(module.scores(batches[0]), sparse, rtol=1e-4, atol=1e-5)


def test_the_base_is_the_score_of_the_means():
    module, batches = started(CASES["one-head/topk"] | {"base": "mean"})
    batch = batches[0]
    q, k = module.queries_keys(batch)
    plain_q, plain_k = module.positions.unrotated(q), module.positions.unrotated(k)
    mean_q, mean_k = module.mean_query[:, None], module.mean_key[:, None]
    rest = module.positions.rotated(plain_q - mean_q) @ module.positions.rotated(plain_k - mean_k).transpose(-1, -2)
    expected = module.true_scores(batch) - rest * module.positions.scale
    allowed = module.positions.allowed(batch.mask)
    assert_close(centred(module.base_scores(batch), allowed), centred(expected, allowed), rtol=1e-3, atol=1e-5)


def test_a_kernel_keeps_its_strongest_frequencies_in_the_end():
    module, _ = started(CASES["two-frequencies/batch_topk"])
    used = (module.coefficients(1.0)[..., :-1].unflatten(-1, (2, 3)).abs().sum((1, 2)) > 0).sum(-1)
    assert (used <= 2).all()
    assert (module.coefficients(0.1)[..., :-1].unflatten(-1, (2, 3)).abs().sum((1, 2)) > 0).sum(-1).max() == 3


def test_centring_leaves_no_constant():
    scores, allowed = torch.randn(2, 3, LENGTH, LENGTH), torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    shifted = scores + torch.randn(2, 3, LENGTH, 1)
    assert_close(centred(shifted, allowed), centred(scores, allowed), rtol=1e-4, atol=1e-5)


def test_models_without_rotation_read_queries_and_keys_alike_whatever_the_position():
    found = []
    for position in ("rotary", "content", "rotated"):
        module = Module(Config.model_validate(CASES["one-head/topk"] | {"position": position}), DIMS)
        module.use_attention_(spec(rotary=None), None)
        batches = [random_batch(seed) for seed in range(4)]
        module.start_(batches, {}, torch.Generator().manual_seed(0))
        found.append(module.eval().scores(batches[0]))
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)
    assert_close(found[2], found[0], rtol=1e-3, atol=1e-4)


def test_wrong_settings_are_refused_in_one_line():
    with pytest.raises(ValueError, match="head 4 is out of range; the model has heads 0 to 3"):
        build(CASES["one-head/topk"] | {"heads": [4]})
    with pytest.raises(ValueError, match="lowest first, each once"):
        Config.model_validate(CASES["one-head/topk"] | {"heads": [2, 1]})
    with pytest.raises(ValueError, match="kernel_frequencies applies to position: rotary"):
        Config.model_validate(CASES["content/topk"] | {"kernel_frequencies": 2})
    module = Module(Config.model_validate(CASES["one-head/topk"]), DIMS)
    with pytest.raises(ValueError, match="call use_attention_"):
        module.start_([random_batch(0)], {}, torch.Generator())


def test_the_registry_builds_and_loads_by_kind(tmp_path):
    assert "qk_diagonal" in KINDS
    config = config_class("qk_diagonal").model_validate(CASES["one-head/topk"])
    assert isinstance(build_kind(config, DIMS), Module)
    with pytest.raises(ValueError, match="unknown attention model 'x'"):
        config_class("x")


def test_contexts_may_be_shorter_than_the_tables_but_not_longer():
    module = Module(Config.model_validate(CASES["one-head/topk"]), DIMS)
    module.use_attention_(spec(), tables(LENGTH + 5))
    batches = [random_batch(seed) for seed in range(4)]
    module.start_(batches, {}, torch.Generator().manual_seed(0))
    assert module.scores(batches[0]).shape == (3, 1, LENGTH, LENGTH)
    module.use_attention_(spec(), tables(LENGTH - 1))
    with pytest.raises(ValueError, match="use shorter contexts"):
        module.scores(batches[0])
