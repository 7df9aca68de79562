"""The conformance suite: every registered architecture keeps the contract of dictionaries/base.py."""

import copy
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.base import Batch
from crosshead.dictionaries.registry import KINDS, build, config_class, load_dictionary
from tests.dictionaries.cases import BASES, CASES, DIMS, SPARSITIES, config_of, padded_batch, random_batch, weights

every_case = pytest.mark.parametrize("case", CASES)
_TURNS = cycle(SPARSITIES)
# Fitting takes seconds: one base of every kind in all forms of sparsity, the other bases in one form each, in turn.
FITTED = [f"{base}/{form}" for base in BASES
          for form in (SPARSITIES if base in ("value_sae-two", *KINDS) else [next(_TURNS)])]  # fmt: skip


def started(case: str, n_batches: int = 4, **sparsity: float):
    module = build(config_of(case, **sparsity), DIMS)
    batches = [random_batch(seed) for seed in range(n_batches)]
    module.train()
    module.start_(batches, weights(), torch.Generator().manual_seed(0))
    return module, batches


def changed(batch: Batch, where_BT: torch.Tensor) -> Batch:
    """The batch with every site's positions ``where_BT`` overwritten (patterns stay: they are data of their own)."""
    sites = {}
    for site, tensor in batch.sites.items():
        tensor = tensor.clone()
        if site.name != "pattern":
            positions_first = tensor.transpose(1, 2) if site.name == "v" else tensor
            positions_first[where_BT] = torch.randn_like(positions_first[where_BT]) * 10
        sites[site] = tensor
    return replace(batch, sites=sites)


def with_hidden_positions_changed(case: str, seed: int) -> tuple[Batch, Batch]:
    """A padded batch and the same with everything overwritten that must not matter."""
    batch = padded_batch(seed)
    hidden_BT = ~batch.mask
    if case.startswith("attn_out_sae-heads"):
        # It reads z_h(t) = sum_s A_h(t,s) v_h(s): the first token's value is part of that datum. Padding's is not,
        # because the base model attends to no padding.
        hidden_BT[:, 0] = False
        attended_BHTT = ~hidden_BT[:, None, None, :]
        sites = {site: tensor * attended_BHTT if site.name == "pattern" else tensor
                 for site, tensor in batch.sites.items()}  # fmt: skip
        batch = replace(batch, sites=sites)
    return batch, changed(batch, hidden_BT)


def test_every_registered_kind_is_among_the_cases():
    assert {case["kind"] for case in CASES.values()} == set(KINDS)


@every_case
def test_shapes(case):
    module, (batch, *_) = started(case)
    codes = module.encode(batch)
    width = sum(module.target_widths)
    assert (codes.n_rows, codes.n_features) == (batch.mask.numel(), module.config.features)
    assert module.decode(codes, batch).shape == module.target(batch).shape == (*batch.mask.shape, width)
    assert module.feature_norms().shape == (module.config.features,)
    for site, value in module.reconstruct(batch).items():
        assert value.shape == batch[site].shape
    loadings = module.head_loadings()
    assert loadings is None or loadings.shape[0] == module.config.features


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
    batch, other = with_hidden_positions_changed(case, 0)
    results = []
    for one in (batch, other):
        codes = module.encode(one, 0.5)
        assert batch.mask.flatten()[codes.rows].all()
        loss = module.loss(one, 0.5)
        gradients = torch.autograd.grad(loss.total, list(module.parameters()))
        results.append((loss.total, loss.l0, loss.normalised_mse, module.decode(codes, one), *gradients))
    assert_close(results[1], results[0])


@every_case
def test_start_and_calibration_see_counted_positions_only(case):
    states = []
    for batches in zip(*(with_hidden_positions_changed(case, seed) for seed in range(4)), strict=True):
        module = build(config_of(case), DIMS)
        module.start_(batches, weights(), torch.Generator().manual_seed(0))
        module.calibrate_(batches)
        states.append(module.state_dict())
    assert_close(states[1], states[0])


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("sae_best_head")])  # it sees whole contexts
def test_a_later_token_never_changes_an_earlier_output(case):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval()
    batch = batches[0]
    later = changed(batch, torch.arange(batch.mask.shape[1]).expand_as(batch.mask) >= 6)
    before = module.decode(module.encode(batch), batch)
    after = module.decode(module.encode(later), later)
    assert_close(after[:, :6], before[:, :6])
    assert not torch.equal(after[:, 6:], before[:, 6:])


@every_case
def test_save_and_load_are_exact(case, tmp_path):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval()
    module.save(tmp_path / "dictionary")
    loaded = load_dictionary(tmp_path / "dictionary")
    assert loaded.config == module.config
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert torch.equal(loaded.decode(loaded.encode(batches[0]), batches[0]),
                       module.decode(module.encode(batches[0]), batches[0]))  # fmt: skip


@pytest.mark.parametrize("case", FITTED)
def test_a_tiny_batch_is_overfitted(case):
    penalised = "coefficient" in CASES[case]["sparsity"]
    module, batches = started(case, **({"coefficient": 1e-3, "negative_coefficient": 1e-3} if penalised else {}))
    batch, steps = batches[0], 150
    optimiser = torch.optim.Adam([
        {"params": g.parameters, "lr": 3e-2 * g.multiplier} for g in module.parameter_groups()
    ])  # fmt: skip
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, 2.0 - 2.0 * step / steps))
    assert module.loss(batch).normalised_mse > 0.3
    for step in range(steps):
        optimiser.zero_grad()
        module.loss(batch, step / steps).total.backward()
        optimiser.step()
        decay.step()
        module.project_()
    # The joint MTC must do with activations that are trained for something else, Top-1 with one head per feature;
    # with so few degrees of freedom, rounding decides which units win and so how near they come.
    assert module.loss(batch).normalised_mse < (0.1 if case.startswith(("joint_mtc", "mtc-top1")) else 0.02)


@every_case
def test_equal_seeds_start_equally(case):
    first, second = started(case)[0], started(case)[0]
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@every_case
def test_denormalising_the_target_returns_the_raw_activations(case):
    module, (batch, *_) = started(case)
    raw = module.denormalise(module.target(batch))
    for site, value in raw.items():
        assert_close(value, batch[site], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("/batch_topk")])
def test_calibrated_threshold_gives_k_on_the_calibration_data(case):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval()
    active = sum(len(module.encode(b).values) for b in batches)
    counted = sum(b.n_counted for b in batches)
    assert active == pytest.approx(module.config.sparsity.k * counted, abs=2)


def off_centre(case: str):
    """A calibrated module whose normalisation is far from trivial, and a batch that it has not seen."""
    module, batches = started(case)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in module.named_buffers():
        if name.endswith(("mean", "means")):
            buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
        elif name.endswith(("scale", "scales")):
            buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)
            if CASES[case]["sparsity"]["kind"] == "topk":
                buffer.fill_(1.7)  # one scale for all sites: others are refused
    module.calibrate_(batches)
    return module.eval(), padded_batch(50)


def assert_acts_alike(folded, module, batch: Batch, tolerance: float):
    ours, expected = folded.encode(batch), module.encode(batch)
    assert torch.equal(ours.rows, expected.rows)
    assert torch.equal(ours.columns, expected.columns)
    assert len(expected.values)
    assert_close(ours.values, expected.values, rtol=tolerance, atol=tolerance)
    raw = module.reconstruct(batch)
    assert folded.reconstruct(batch).keys() == raw.keys()
    for site, value in folded.reconstruct(batch).items():
        assert_close(value, raw[site], rtol=tolerance, atol=tolerance * float(raw[site].detach().abs().max()))


@every_case
def test_folded_acts_alike_on_raw_activations_and_survives_saving(case, tmp_path):
    module, batch = off_centre(case)
    before = copy.deepcopy(module.state_dict())
    folded = module.folded()
    assert type(folded) is type(module)
    assert not folded.training
    for name, buffer in folded.named_buffers():
        if name.endswith(("mean", "means")):
            assert (buffer == 0).all(), name
        elif name.endswith(("scale", "scales")):
            assert (buffer == 1).all(), name
    assert_acts_alike(folded, module, batch, 2e-5)
    assert_close(module.state_dict(), before, rtol=0, atol=0)
    folded.save(tmp_path / "folded")
    loaded = load_dictionary(tmp_path / "folded")
    assert loaded.config == folded.config
    assert_close(loaded.state_dict(), folded.state_dict(), rtol=0, atol=0)
    assert_acts_alike(loaded, module, batch, 2e-5)


@every_case
def test_folding_is_exact_in_float64_and_needs_no_evaluation_mode(case):
    module, batch = off_centre(case)
    module.double()
    folded = module.train().folded()
    assert_acts_alike(folded, module.eval(), batch, 1e-12)


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("/batch_topk")])
def test_folded_batch_topk_is_a_jumprelu_that_never_chooses_a_feature_that_writes_nothing(case, calibrated):
    module, batch = off_centre(case)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("decoder"):
                parameter[[2, 7]] = 0.0
        if not calibrated:
            module.encoder.threshold.zero_()
    folded = module.folded()
    assert folded.config.sparsity.kind == "jumprelu"
    assert all(torch.isfinite(tensor).all() for tensor in folded.state_dict().values())
    assert_acts_alike(folded, module, batch, 2e-5)
    assert not (folded.encode(batch).columns == 2).any()


def test_folding_topk_over_layers_of_different_scales_is_refused():
    module, _ = started("value_sae-two/topk")
    with pytest.raises(ValueError, match=r"folding sites of scales \(.*, .*use sparsity\.kind: batch_topk"):
        module.folded()


def test_unknown_architecture_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"unknown architecture 'mtcc'.*choose one of"):
        config_class("mtcc")
    module, _ = started("value_sae-one/topk")
    module.save(tmp_path / "run")
    weights_file = tmp_path / "run" / "weights.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"weights\.safetensors cannot be read"):
        load_dictionary(tmp_path / "run")


def test_k_above_the_number_of_features_is_refused():
    config = config_class("value_sae").model_validate(
        {"kind": "value_sae", "layers": [2], "features": 4, "sparsity": {"kind": "topk", "k": 5}}
    )
    with pytest.raises(ValueError, match=r"k=5 exceeds features=4; lower"):
        build(config, DIMS)
