"""Every architecture's loss and gradients equal those of the dense oracle."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosshead.dictionaries.base import Batch, Dictionary
from crosshead.dictionaries.registry import build
from crosshead.maths.engine import Engine
from tests.dictionaries.cases import CASES, DIMS, config_of, padded_batch, random_batch, weights
from tests.dictionaries.dense import dense_loss
from tests.dictionaries.test_contract import started

PROGRESS = (0.07, 0.2, 0.45, 1.0)  # penalties warming up, k annealing; only the latter; movers fading; training's end

every_case = pytest.mark.parametrize("case", CASES)


def perturbed(case: str, seed: int) -> Dictionary:
    """A started module with every parameter and factor moved away from the special values of a start."""
    module, _ = started(case, n_batches=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * noise * parameter.abs().mean().clamp(min=0.1)
    module.project_()
    return module


def gradients(loss: torch.Tensor, module: Dictionary) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True))


def compare(module: Dictionary, batch: Batch, progress: float, parts_tolerance=1e-12, gradient_tolerance=1e-10):
    """Compare with the oracle of a float64 copy; return the oracle's result for assertions on the case itself."""
    oracle_module = copy.deepcopy(module).double()
    ours, oracle = module.loss(batch, progress), dense_loss(oracle_module, batch, progress)
    assert ours.parts.keys() == oracle.parts.keys()
    for name, part in ours.parts.items():
        assert float(part.detach()) == pytest.approx(float(oracle.parts[name].detach()), rel=parts_tolerance), name
    assert ours.l0 == pytest.approx(oracle.l0)
    assert ours.normalised_mse == pytest.approx(oracle.normalised_mse, rel=parts_tolerance)
    assert torch.equal(ours.fired, oracle.fired)
    total = torch.stack(list(oracle.parts.values())).sum()
    names = [name for name, _ in module.named_parameters()]
    expected = gradients(total, oracle_module)
    for name, ours_gradient, gradient in zip(names, gradients(ours.total, module), expected, strict=True):
        assert (ours_gradient - gradient).norm() <= gradient_tolerance * gradient.norm(), name
    return oracle, dict(zip(names, expected, strict=True))


@pytest.mark.parametrize("seed", range(4))
@every_case
def test_loss_and_every_gradient_equal_the_dense_oracle(case, seed):
    module = perturbed(case, seed).double()
    _, expected = compare(module, padded_batch(100 + seed), PROGRESS[seed])
    assert all(gradient.norm() > 0 for gradient in expected.values())


@every_case
def test_empty_rows_and_dead_features_change_nothing_of_that(case):
    module, batch = perturbed(case, 5).double(), padded_batch(105)
    with torch.no_grad():
        module.encoder.bias -= 1.5 * module.encoder.weight.norm(dim=1)
        module.encoder.bias[::4] = -50.0
    oracle, _ = compare(module, batch, 1.0)
    assert (oracle.codes[batch.mask.flatten()] == 0).all(1).any()
    assert not oracle.fired[::4].any()
    assert oracle.fired.any()


@every_case
def test_a_batch_without_any_active_feature_has_the_oracles_gradients(case):
    module = perturbed(case, 6).double()
    with torch.no_grad():
        module.encoder.bias.fill_(-50.0)
    oracle, _ = compare(module, padded_batch(106), 1.0)
    assert not oracle.fired.any()


@every_case
def test_float32_agrees_with_the_float64_oracle(case):
    compare(perturbed(case, 7), padded_batch(107), 0.2, parts_tolerance=1e-5, gradient_tolerance=1e-5)


SHAPED = [case for case in CASES if case.partition("/")[0] in
          ("mtc", "mtc-top1", "joint_mtc", "sae_best_head", "value_sae-two", "attn_out_sae")]  # fmt: skip


@pytest.mark.parametrize("case", SHAPED)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**16), features=st.integers(8, 40), n_contexts=st.integers(1, 4),
    n_positions=st.integers(2, 12),
    shift=st.sampled_from([-3.0, -1.0, 0.0, 1.0, 30.0]), counted=st.sampled_from([0.3, 0.8, 1.0]),
    form=st.sampled_from(["sparse", "dense"]), progress=st.sampled_from([0.2, 1.0]),
)  # fmt: skip
def test_gradients_equal_the_oracle_at_any_shape_and_density(
    case, seed, features, n_contexts, n_positions, shift, counted, form, progress
):
    """``shift`` moves biases in units of encoder norms, so that none to all features are active."""
    config = config_of(case).model_copy(update={"features": features})
    module = build(config, DIMS).train()
    generator = torch.Generator().manual_seed(seed)
    module.start_([random_batch(seed)], weights(), generator)
    batch = random_batch(seed + 1, n_contexts, n_positions)
    batch.mask[:, 1:] &= torch.rand(n_contexts, n_positions - 1, generator=generator) < counted
    batch.mask[0, 1] = True
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * noise * parameter.abs().mean().clamp(min=0.1)
        module.encoder.bias += shift * module.encoder.weight.norm(dim=1)
        module.encoder.bias[0] = -50.0
    module.project_()
    module.engine = Engine(form=form)
    compare(module.double(), batch, progress)
