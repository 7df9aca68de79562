"""Bits against entropies, precision as stated, controls."""

import math
from dataclasses import replace

import pytest
import torch

from crosshead.analysis import description_length
from crosshead.analysis.codings import coded
from crosshead.analysis.description_length import CodeConfig, describe
from crosshead.dictionaries.base import Batch, LayerWeights, Site
from crosshead.dictionaries.registry import build, config_class
from tests.attention.replacements import CASES, DIMS, LAYER, random_batch, started

SPARSITY = {"kind": "batch_topk", "k": 5}


def dictionary(kind: str):
    config = config_class(kind).model_validate({"kind": kind, "layers": [LAYER], "features": 24, "sparsity": SPARSITY})
    module, batches = build(config, DIMS), [random_batch(seed) for seed in range(6)]
    W_O = torch.randn(DIMS.n_heads, DIMS.head_dim, 12, generator=torch.Generator().manual_seed(0))
    module.train()
    module.start_(batches, {LAYER: LayerWeights(W_O, torch.zeros(12))}, torch.Generator().manual_seed(0))
    module.calibrate_(batches)
    return module.eval()


def layer(case: str):
    module, batches = started(case)
    module.calibrate_(batches)
    return module.eval()


MODELS = {"mtc": lambda: dictionary("mtc"), "attn_out_sae": lambda: dictionary("attn_out_sae")} | {
    case: lambda case=case: layer(case) for case in ("plain", "plain-gates", "rank_one", "rank_one-gates", "combined")
}


def written_by(module, seed: int) -> Batch:
    """A batch whose attention output is what the model makes of it, and a tenth of noise: a model that fits."""
    batch, site = random_batch(seed, 6, 16), Site(LAYER, "attn_out")
    (written,) = module.reconstruct(batch).values()
    noise = torch.randn(written.shape, generator=torch.Generator().manual_seed(seed))
    size = (written - written[batch.mask].mean(0))[batch.mask].std()
    return replace(batch, sites={**batch.sites, site: written + 0.1 * size * noise})


def test_which_units_are_active_takes_the_entropy_of_independent_coins():
    generator = torch.Generator().manual_seed(0)
    share = torch.tensor([0.5, 0.1, 0.02, 0.9])
    train, heldout = ((torch.rand(40_000, 4, generator=generator) < share).int()[..., None] for _ in range(2))
    which, values, shuffled = description_length._activation_bits(train, heldout)
    entropy = -(share * share.log2() + (1 - share) * (1 - share).log2()).sum()
    assert which == pytest.approx(float(entropy), rel=0.02)
    assert values < 0.01  # every active level is 1
    assert shuffled > which


def test_values_take_the_entropy_of_their_geometric_law():
    generator, theta = torch.Generator().manual_seed(0), 0.7
    # The difference of two geometric numbers follows the two-sided law.
    numbers = [(torch.rand(2, 20_000, 1, 1, generator=generator).log() / math.log(theta)).floor() for _ in range(2)]
    train, heldout = ((n[0] - n[1] + 1000).int() for n in numbers)
    _, values, _ = description_length._activation_bits(train, heldout)
    n = torch.arange(-200, 201).double()
    p = (1 - theta) / (1 + theta) * theta ** n.abs()
    assert values == pytest.approx(float(-(p * p.log2()).sum()), rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_what_arrives_is_within_the_tolerance_and_shuffled_codes_take_no_fewer_bits(name):
    module = MODELS[name]()
    train, heldout = ([written_by(module, seed) for seed in seeds] for seeds in (range(10, 16), range(20, 23)))
    found = describe(module, train, heldout, CodeConfig(tolerance=0.01))
    assert found.precision_reached
    assert found.normalised_mse_sent <= 1.05 * found.normalised_mse
    assert found.bits == pytest.approx(found.bits_activations + found.bits_positions)
    assert found.bits_shuffled >= found.bits_activations - 1e-9
    assert found.bits_positions_shuffled >= found.bits_positions - 1e-9
    assert (found.least_weight is None) == (name == "attn_out_sae") == (found.bits_positions == 0)
    coarse = describe(module, train, heldout, CodeConfig(tolerance=0.2))
    assert coarse.bits < found.bits
    assert coarse.step >= found.step
    assert found.normalised_mse < 0.2 or name == "attn_out_sae"  # which is not trained


@pytest.mark.parametrize("name", MODELS)
def test_unchanged_coordinates_predict_what_the_model_predicts(name):
    module, batch = MODELS[name](), random_batch(30)
    coding = coded(module)
    expected = module.decode(module.encode(batch), batch)
    found = coding.predict(coding.coordinates(batch), batch, None)
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], rtol=1e-4, atol=1e-4)
    if coding.has_positions:
        named = coding.predict(coding.coordinates(batch), batch, 1e-7)
        torch.testing.assert_close(named[batch.mask], expected[batch.mask], rtol=1e-3, atol=1e-3)


def test_a_step_is_an_error_of_the_same_length_for_every_unit():
    coding, batch = coded(layer("plain")), random_batch(30)
    coordinates = coding.coordinates(batch)
    base = coding.predict(coordinates, batch, None).flatten(0, 1)
    for unit, axis in ((0, 0), (5, 1)):
        changed = coordinates.clone()
        changed[:, unit, axis] += 0.25
        moved = coding.predict(changed, batch, None).flatten(0, 1) - base
        torch.testing.assert_close(moved.norm(dim=1), torch.full((len(moved),), 0.25), rtol=1e-3, atol=1e-4)


def test_keys_by_octave_cost_little_where_their_distance_is_always_the_same():
    octave = description_length._octaves(10)
    assert octave[7].tolist() == [0, 3, 3, 3, 3, 2, 2, 1, -1, -1]
    levels = torch.zeros(2, 1, 10, 10, dtype=torch.int32)
    levels[:, :, torch.arange(10), torch.arange(10)] = 1  # every query names itself alone
    rows = torch.ones(2, 1, 10, dtype=torch.bool)
    counts = description_length._Counts(1, 5)
    description_length._count(counts, slice(0, 1), levels, rows, octave)
    assert counts.seen[0].tolist() == [20, 18, 30, 36, 6]
    share = (counts.named + 0.5) / (counts.seen + 1)
    assert description_length._named_bits(counts, share) / 20 < 0.8


def test_other_architectures_have_no_code():
    config = config_class("value_sae").model_validate(
        {"kind": "value_sae", "layers": [LAYER], "features": 24, "sparsity": SPARSITY}
    )
    with pytest.raises(ValueError, match="no description length is defined for 'value_sae'"):
        coded(build(config, DIMS))


def test_every_form_of_replacement_layer_has_a_code():
    for case in CASES:
        assert coded(started(case)[0]).has_positions


def test_steps_are_chosen_without_a_look_at_what_is_sent():
    module = layer("plain")
    train = [written_by(module, seed) for seed in range(2)]
    one, other = (describe(module, train, [written_by(module, seed)], CodeConfig()) for seed in (5, 6))
    assert one.normalised_mse != other.normalised_mse
    assert (one.step, one.least_weight) == (other.step, other.least_weight)
