"""Attention replacement layers: the contract of trainable models, planted truths and closed forms."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from crosshead.activations.capture import attention_specs, capture, rotary_tables
from crosshead.attention import wide
from crosshead.attention.registry import load_attention_model
from crosshead.attention.replacement import Config, Module
from crosshead.dictionaries.base import Batch, ModelDims, Site
from tests.attention.replacements import (
    CASES,
    DIMS,
    LAYER,
    SPEC,
    config_of,
    padded_batch,
    random_batch,
    started,
    tables,
)

every_case = pytest.mark.parametrize("case", CASES)


# ---- the contract ----


@every_case
def test_gradients_reach_every_parameter_and_groups_hold_each_once(case):
    module, batches = started(case)
    for batch in batches:
        module.loss(batch, 0.5).total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    grouped = [id(p) for group in module.parameter_groups() for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in module.parameters())


@pytest.mark.parametrize("training", [True, False])
@every_case
def test_masked_positions_have_no_influence(case, training):
    module, batches = started(case)
    module.calibrate_(batches)
    module.train(training)
    batch, results = padded_batch(7), []
    hidden = {site: tensor.clone() for site, tensor in batch.sites.items()}
    for name in ("resid_in", "attn_out"):
        site = hidden[Site(LAYER, name)]
        site[~batch.mask] = 10 * torch.randn_like(site[~batch.mask])
    for one in (batch, replace(batch, sites=hidden)):
        loss = module.loss(one, 0.5)
        gradients = torch.autograd.grad(loss.total, list(module.parameters()))
        prediction = module.decode(module.encode(one, 0.5), one)[batch.mask]
        results.append((loss.total, loss.l0, loss.normalised_mse, prediction, *gradients))
    assert_close(results[1], results[0])


@every_case
def test_a_later_token_never_changes_an_earlier_output(case):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval()
    batch, site = batches[0], Site(LAYER, "resid_in")
    x = batch[site].clone()
    x[:, 6:] += torch.randn_like(x[:, 6:])
    later = replace(batch, sites={**batch.sites, site: x})
    before, after = (module.decode(module.encode(b), b) for b in (batch, later))
    assert_close(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


@every_case
def test_save_and_load_are_exact(case, tmp_path):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval().save(tmp_path / "run")
    loaded = load_attention_model(tmp_path / "run")
    assert loaded.config == module.config
    assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded.encode(batches[0]), module.encode(batches[0]))


@every_case
def test_equal_seeds_start_equally_and_the_start_is_small(case):
    (first, batches), (second, _) = started(case), started(case)
    assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert 0.8 < first.loss(batches[0], 0.0).normalised_mse < 1.2


@every_case
def test_denormalising_the_target_returns_the_raw_activations(case):
    module, (batch, *_) = started(case)
    (raw,) = module.denormalise(module.target(batch)).values()
    assert_close(raw, batch[Site(LAYER, "attn_out")], rtol=1e-4, atol=1e-4)


@every_case
def test_sizes_are_the_lengths_of_what_heads_write(case):
    module, (batch, *_) = started(case)
    z = module.encode(batch)
    out = module.out.unflatten(0, (module.config.features, -1))
    written = torch.einsum("nuw,uwd->nud", z.unflatten(1, (module.config.features, -1)), out)
    assert_close(module.sizes(z), written.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert_close(written.sum(1) + module.decoder_bias, module.decode(z, batch).flatten(0, 1), rtol=1e-4, atol=1e-4)


# ---- memory ----


@every_case
def test_chunks_give_the_gradients_of_the_whole(case):
    gradients, begun = [], None
    for mib in (1e-9, 1e3):
        module, batches = started(case, patterns_mib=mib)
        begun = begun or module.state_dict()
        module.load_state_dict(begun)  # starts run in chunks as well, in float32
        module.double()
        loss = module.loss(padded_batch(3), 0.7)
        gradients.append(torch.autograd.grad(loss.total, list(module.parameters())))
        assert batches
    assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the largest memory behind any result."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("pattern", [{"kind": "none"}, {"kind": "entropy", "coefficient": 0.1}])
def test_no_tensor_of_a_step_is_as_large_as_the_patterns(pattern):
    heads, contexts, positions = 64, 2, 64
    module, _ = started("plain", features=heads, pattern=pattern, patterns_mib=contexts * positions**2 * 4 / 2**20)
    batch = random_batch(0, contexts, positions)
    with Largest() as largest:
        module.loss(batch, 1.0).total.backward()
    assert largest.elements <= 2 * contexts * heads * positions * 3 < contexts * heads * positions**2 / 10


# ---- closed forms and planted truths ----


def test_patterns_are_the_written_formula():
    module, (batch, *_) = started("plain")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    module.double()
    x = module.inputs(batch)
    position = torch.arange(x.shape[1]).double()
    for g in (0, 5):
        q, k = (x @ m[g].T + b[g] for m, b in ((module.query, module.query_bias), (module.key, module.key_bias)))
        k = torch.cat([module.bos_key[g].expand(len(x), 1, -1), k[:, 1:]], 1)
        turn = position * module.frequency[g, 0]
        complex_q, complex_k = (torch.complex(y[..., 0], y[..., 1]) * torch.polar(torch.ones_like(turn), turn)
                                for y in (q, k))  # fmt: skip
        scores = (complex_q[:, :, None] * complex_k[:, None].conj()).real / 2**0.5
        scores[..., 0] += module.bos_score[g]
        future = position[None, :] > position[:, None]
        expected = scores.masked_fill(future, -torch.inf).softmax(-1)
        assert_close(module.patterns(batch, slice(g, g + 1))[:, 0], expected.detach(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["llama"])
def test_copies_of_the_base_layers_queries_and_keys_give_its_patterns(family, tiny_model):
    model, layer = tiny_model(family), 1
    dims, spec = model.dims, attention_specs(model, [layer])[layer]
    names = ("resid_in", "q", "k", "pattern", "attn_out")
    batches = []
    for seed in range(3):
        tokens = torch.randint(1, 250, (4, 24), generator=torch.Generator().manual_seed(seed))
        tokens[:, 0] = 0
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[:, 0] = False
        batches.append(Batch(capture(model, tokens, [Site(layer, name) for name in names]), mask, tokens))
    config = Config(layers=(layer,), features=2 * dims.n_heads, head_dim=dims.head_dim, start="base_qk")
    module = Module(config, dims)
    module.use_attention_(spec, rotary_tables(model, layer, 24))
    module.start_(batches[:2], {}, torch.Generator().manual_seed(0))
    for h in range(config.features):
        found = module.patterns(batches[2], slice(h, h + 1))[:, 0]
        expected = batches[2][Site(layer, "pattern")][:, h % dims.n_heads]
        assert_close(found[:, 1:], expected[:, 1:], rtol=0, atol=2e-4)


def test_narrow_copies_share_out_the_pairs_of_a_base_head():
    module, _ = started("plain-base", features=12)  # three copies of every head; two of its three pairs each
    frequency = module.frequency.view(3, 4, 2)
    for head in range(4):
        used = torch.cat([frequency[0, head], frequency[1, head]])
        assert len(used.unique()) == 3


def test_starting_from_copies_needs_the_attention_spec():
    module = Module(config_of("plain-base"), DIMS)
    with pytest.raises(ValueError, match="call use_attention_ before start_"):
        module.start_([random_batch(0)], {}, torch.Generator())


def train(module: Module, batches, steps: int, learning_rate: float) -> None:
    optimiser = torch.optim.Adam([
        {"params": g.parameters, "lr": learning_rate * g.multiplier} for g in module.parameter_groups()
    ])  # fmt: skip
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 2.0 - 2.0 * step / steps))
    for step in range(steps):
        optimiser.zero_grad()
        module.loss(batches[step % len(batches)], step / steps).total.backward()
        optimiser.step()
        decay.step()
        module.project_()


def planted(teacher: Module, seed: int) -> Batch:
    """A batch whose attention output is what the teacher writes."""
    batch = random_batch(seed, 16, 12)
    (written,) = teacher.reconstruct(batch).values()
    return replace(batch, sites={**batch.sites, Site(LAYER, "attn_out"): written.detach()})


def make_teacher() -> Module:
    """Two narrow heads with sharp patterns."""
    teacher, _ = started("plain", features=2)
    with torch.no_grad():
        for maps in (teacher.query, teacher.key):
            maps.mul_(2.0)
        teacher.out.mul_(10.0)
    return teacher


def test_a_planted_layer_is_matched_on_contexts_it_was_not_trained_on():
    teacher = make_teacher()
    batches = [planted(teacher, seed) for seed in range(12)]
    module = Module(config_of("plain", features=12), DIMS)
    module.use_attention_(SPEC, tables())
    module.start_(batches[:4], {}, torch.Generator().manual_seed(1))
    train(module.train(), batches, 500, 2e-2)
    assert module.loss(planted(teacher, 100)).normalised_mse < 0.02


@pytest.mark.parametrize("case", ["rank_one", "combined"])
def test_a_tiny_batch_is_overfitted(case):
    module, (batch, *_) = started(case)
    train(module, [batch], 200, 3e-2)
    assert module.loss(batch).normalised_mse < 0.05


def test_the_least_penalty_over_all_factors_is_the_nuclear_norm():
    module, (batch, *_) = started(
        "plain-nuclear", features=2, head_dim=12, lambda_qk=0.7, lambda_ov=0.0, start="random"
    )
    module.double()
    target = torch.randn(2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factors = [module.query, module.key]
    optimiser = torch.optim.LBFGS(factors, max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def objective() -> torch.Tensor:
        product = module.query.transpose(1, 2) @ module.key
        penalty = module.loss(batch, 1.0).parts["nuclear_qk"]
        return 0.5 * (product - target).square().sum() + penalty

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = objective()
        value.backward()
        return value

    optimiser.step(closure)
    singular = torch.linalg.svdvals(target)
    # Soft-thresholded singular values minimise 1/2 ||X - target||^2 + 0.7 ||X||_*.
    kept = (singular - 0.7).clamp(min=0)
    assert float(objective()) == pytest.approx(
        float(0.5 * (singular - kept).square().sum() + 0.7 * kept.sum()), rel=1e-6
    )
    found = torch.linalg.svdvals(module.query.transpose(1, 2) @ module.key)
    assert_close(found.detach(), kept, rtol=1e-3, atol=1e-3)


def test_heads_that_are_not_needed_die_under_pressure_and_stay_dead():
    teacher = make_teacher()
    batches = [planted(teacher, seed) for seed in range(8)]
    open_gates = []
    for coefficient in (0.0, 0.3, 1e3):
        gates = {"coefficient": coefficient, "start_fraction": 0.3, "warmup_fraction": 0.2, "multiplier": 1.0}
        module = Module(config_of("plain", features=12, gates=gates), DIMS)
        module.use_attention_(SPEC, tables())
        module.start_(batches[:4], {}, torch.Generator().manual_seed(1))
        train(module.train(), batches, 300, 2e-2)
        open_gates.append(int((module.gate > 0).sum()))
        dead = module.gate == 0
        train(module, batches, 3, 2e-2)
        assert (module.gate[dead] == 0).all()
        written = module.sizes(module.encode(batches[0]))
        assert (written[:, module.gate == 0] == 0).all()
    assert open_gates[0] == 12
    assert 1 <= open_gates[1] < 12
    assert open_gates[2] == 0


def test_pattern_penalties_charge_what_they_say():
    n_positions = 9
    for case, uniform, single in (("plain-entropy", lambda n: n.log(), 0.0), ("plain-power", lambda n: n.sqrt(), 1.0)):
        module, (batch, *_) = started(case)
        with torch.no_grad():
            for parameter in (module.query, module.key, module.query_bias, module.key_bias, module.bos_score):
                parameter.zero_()
            keys = torch.arange(2, n_positions + 1).float()  # queries at positions 1 to 8
            assert float(module.loss(batch, 1.0).parts["pattern"]) == pytest.approx(
                0.5 * float(uniform(keys).mean()), rel=1e-4
            )
            module.bos_score.fill_(80.0)
            assert float(module.loss(batch, 1.0).parts["pattern"]) == pytest.approx(0.5 * single, abs=1e-3)
            assert float(module.loss(batch, 0.05).parts["pattern"]) == pytest.approx(0.25 * single, abs=1e-3)


def test_rank_one_heads_write_only_where_they_are_among_the_strongest():
    module, (batch, *_) = started("rank_one")
    counted = batch.mask.flatten()
    assert ((module.encode(batch, 0.0)[counted] != 0).sum(1) == 12).all()  # annealed from four times as many
    for progress, mode in ((1.0, True), (0.0, False)):
        module.train(mode)
        z, whole = module.encode(batch, progress)[counted], module.moved(batch, progress).z_NC[counted]
        sizes = whole.abs() * module.out.norm(dim=1)
        assert ((z != 0).sum(1) == 5).all()
        assert (sizes.where(z != 0, torch.inf).amin(1) >= sizes.where(z == 0, 0.0).amax(1)).all()
        assert_close(z[z != 0], whole[z != 0])


def test_combined_qk_features_are_sparse_rank_one_and_turn_by_one_frequency():
    module, (batch, *_) = started("combined")
    module.double()
    q, k = module.queries_keys(batch)
    u, v = (side[..., :-1].unflatten(-1, (6, 2)).norm(dim=-1) for side in (q, k))
    assert ((u > 1e-9).sum(-1) <= 3).all()
    assert ((v[:, :, 1:] > 1e-9).sum(-1) <= 3).all()
    position = torch.arange(9).double()
    distance = position[:, None] - position
    angle = module.frequency[2, :, None, None] * distance + module.phase[2, :, None, None]
    expected = torch.einsum("ti,si,its->ts", u[0, 2], v[0, 2], angle.cos())
    found = q[0, 2, :, :-1] @ k[0, 2, :, :-1].T
    assert_close(found[:, 1:], expected[:, 1:], rtol=1e-6, atol=1e-9)
    assert (module.frequency[:, 1::2] == 0).all()
    assert (module.frequency[:, 0::2] > 0).all()


@pytest.mark.parametrize(("changes", "message"), [
    ({"variant": {"kind": "rank_one", "groups": 3, "active": 2}}, "groups=3 does not divide features=8"),
    ({"variant": {"kind": "rank_one", "groups": 4, "active": 9}}, "active=9 exceeds features=8"),
    ({"head_dim": 3}, "multiple of 2"),
    ({"start": "base_qk", "variant": CASES["combined"]["variant"] | {"qk_active": 2}}, "starts from start: random"),
    ({"variant": CASES["combined"]["variant"]}, "qk_active=3 exceeds head_dim=2"),
])  # fmt: skip
def test_numbers_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("plain", **changes)


def test_a_head_wider_than_the_base_layers_cannot_copy_it():
    dims = ModelDims(**DIMS.model_dump() | {"head_dim": 2})
    module = Module(config_of("plain-base"), dims)
    module.use_attention_(SPEC.model_copy(update={"head_dim": 2}), None)
    with pytest.raises(ValueError, match="head_dim=4 exceeds the base layer's 2"):
        module.start_([random_batch(0)], {}, torch.Generator())


@pytest.mark.parametrize(("features", "head_dim", "where", "what"), [(4, 6, 1.0, 1.0), (24, 2, 3**0.5, 0.5)])
def test_steps_are_as_large_for_many_narrow_heads_as_for_few_wide_ones(features, head_dim, where, what):
    config = Config.model_validate({"layers": [LAYER], "features": features, "head_dim": head_dim})
    module = Module(config, DIMS)
    multipliers = {id(p): group.multiplier for group in module.parameter_groups() for p in group.parameters}
    assert multipliers[id(module.query)] == multipliers[id(module.key)] == pytest.approx(where)
    for term in (module.query_bias, module.key_bias, module.bos_key):
        assert multipliers[id(term)] == pytest.approx(where * config.terms_multiplier)
    assert multipliers[id(module.out)] == pytest.approx(what)
    assert multipliers[id(module.value)] == 1.0
    assert multipliers[id(module.bos_score)] == config.terms_multiplier


def test_attention_kernels_see_one_aligned_width(monkeypatch):
    seen, own = [], wide.scaled_dot_product_attention
    monkeypatch.setattr(wide, "scaled_dot_product_attention", lambda *a, **k: seen.extend(a) or own(*a, **k))
    q, k, v = (torch.randn(2, 4, 7, w) for w in (5, 5, 3))
    z = wide.attend(q, k, v, torch.ones(2, 7, dtype=torch.bool), scale=0.5).z_BGTW
    assert {x.shape[-1] for x in seen} == {8}
    assert_close(z, wide.patterns(q, k, None, 0.5) @ v)
