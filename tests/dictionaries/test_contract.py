"""The conformance suite: every registered architecture keeps the contract of dictionaries/base.py."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.base import Batch
from crosshead.dictionaries.registry import KINDS, build, config_class, load_dictionary
from tests.dictionaries.cases import CASES, DIMS, config_of, random_batch, weights

every_case = pytest.mark.parametrize("case", CASES)


def started(case: str, n_batches: int = 4):
    module = build(config_of(case), DIMS)
    batches = [random_batch(seed) for seed in range(n_batches)]
    module.train()
    module.start_(batches, weights(), torch.Generator().manual_seed(0))
    return module, batches


def changed(batch: Batch, where) -> Batch:
    """The batch with every site's positions ``where`` overwritten (patterns stay: they are data of their own)."""
    sites = {}
    for site, tensor in batch.sites.items():
        tensor = tensor.clone()
        if site.name in ("resid_in", "attn_out", "resid_out"):
            tensor[:, where] = torch.randn_like(tensor[:, where]) * 10
        elif site.name == "v":
            tensor[:, :, where] = torch.randn_like(tensor[:, :, where]) * 10
        sites[site] = tensor
    return replace(batch, sites=sites)


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


# The per-head form reads z_h(t) = sum_s A_h(t,s) v_h(s): the first token's value is part of that datum.
@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("attn_out_sae-heads")])
def test_masked_positions_have_no_influence(case):
    module, (batch, *_) = started(case)
    module.eval()
    other = changed(batch, [0])
    assert not (module.encode(batch).rows % batch.mask.shape[1] == 0).any()
    assert_close(module.loss(other).total, module.loss(batch).total)
    assert_close(module.decode(module.encode(other), other), module.decode(module.encode(batch), batch))


@every_case
def test_a_later_token_never_changes_an_earlier_output(case):
    module, batches = started(case)
    module.calibrate_(batches)
    module.eval()
    batch = batches[0]
    later = changed(batch, list(range(6, batch.mask.shape[1])))
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


@every_case
def test_a_tiny_batch_is_overfitted(case):
    module, batches = started(case)
    batch = batches[0]
    optimiser = torch.optim.Adam([
        {"params": g.parameters, "lr": 1e-2 * g.multiplier} for g in module.parameter_groups()
    ])  # fmt: skip
    first = module.loss(batch).normalised_mse
    for step in range(300):
        optimiser.zero_grad()
        module.loss(batch, step / 300).total.backward()
        optimiser.step()
        module.project_()
    assert module.loss(batch).normalised_mse < 0.4 * first


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
