"""Frequencies out of rotary tables, and pairs of coordinates."""

import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.capture import attention_specs, rotary_tables
from crosshead.attention.narrow_rotary import base_pairs, frequencies_of, rotate, tables_factor
from crosshead.maths.patterns import undo_rotation


def made_tables(interleaved: bool, length: int = 256, factor: float = 1.0):
    frequency = (10000.0 ** -(torch.arange(0, 32, 2).double() / 32)).float()
    angle = torch.arange(length).float()[:, None] * frequency
    angle = angle.repeat_interleave(2, 1) if interleaved else torch.cat([angle, angle], 1)
    return frequency, factor * angle.cos(), factor * angle.sin()


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_frequencies_come_back_to_the_bit(interleaved, factor):
    frequency, cos, sin = made_tables(interleaved, factor=factor)
    found = frequencies_of(cos, sin, interleaved=interleaved)
    assert_close(found, frequency, rtol=2e-7, atol=1e-9)
    assert tables_factor(cos, sin) == pytest.approx(factor)


def test_tables_that_are_not_linear_in_the_position_are_refused():
    _, cos, sin = made_tables(False)
    with pytest.raises(ValueError, match="not linear in the position"):
        frequencies_of(cos[torch.randperm(256)], sin, interleaved=False)


@pytest.mark.parametrize("interleaved", [True, False])
def test_turning_pairs_is_the_inverse_of_undoing_the_rotation(interleaved):
    frequency, cos, sin = made_tables(interleaved, 10)
    x = torch.randn(2, 1, 10, 40, generator=torch.Generator().manual_seed(0))  # 8 coordinates pass through
    pairs = base_pairs(40, 32, interleaved)
    assert sorted(pairs.flatten().tolist()) == list(range(40))
    turned = rotate(x[..., pairs.flatten()], torch.cat([frequency, torch.zeros(4)])[None])
    back = torch.empty_like(turned)
    back[..., pairs.flatten()] = turned
    assert_close(undo_rotation(back, cos, sin, interleaved=interleaved), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3"])
def test_the_models_own_tables_follow_from_the_frequencies(family, tiny_model):
    model = tiny_model(family)
    found, spec = rotary_tables(model, 1, 40), attention_specs(model, [1])[1]
    assert found is not None
    frequency = frequencies_of(*found, interleaved=spec.rotary_interleaved)
    columns = slice(0, None, 2) if spec.rotary_interleaved else slice(0, len(frequency))
    angle = torch.arange(40).float()[:, None] * frequency
    assert_close(angle.cos(), found[0][:, columns], rtol=0, atol=1e-6)
    assert_close(angle.sin(), found[1][:, columns], rtol=0, atol=1e-6)
