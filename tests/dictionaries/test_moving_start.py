import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.base import Site
from crosshead.dictionaries.moving_start import base_maps, draw_sources, moved_energies
from crosshead.dictionaries.registry import build
from crosshead.dictionaries.starts import value_map
from tests.dictionaries.cases import DIMS, config_of, padded_batch, random_batch, weights

PATTERN = Site(2, "pattern")


def prepared(case: str = "mtc/topk", batches=None):
    """A module in its units, the batches, and its base maps."""
    batches = batches or [random_batch(0), padded_batch(1)]
    module = build(config_of(case), DIMS)
    with torch.no_grad():
        x = module.start_units_(batches)
        return module, batches, base_maps(module, batches, weights()[2], x)


def test_moved_energy_is_what_a_token_writes_times_the_attention_it_receives():
    module, batches, maps = prepared()
    energies, column = moved_energies(module, batches, maps), 0
    for b in batches:
        x = module.inputs(b).view(*b.mask.shape, -1)
        for c, s in b.mask.nonzero().tolist():
            for m in range(5):
                attended = sum(float(b[PATTERN][c, m - 1, t, s]) for t in range(9) if b.mask[c, t]) if m else 1.0
                expected = attended * float((x[c, s] @ maps[m]).square().sum())
                assert float(energies[m, column]) == pytest.approx(expected, rel=1e-4)
            column += 1
    assert energies.shape == (5, column)


def test_energy_draws_tokens_in_proportion_to_what_the_features_own_mover_moves():
    module, batches, maps = prepared()
    mover = torch.arange(5).repeat_interleave(4000)
    drawn = draw_sources(module, batches, maps, mover, "energy", torch.Generator().manual_seed(0))
    energies = moved_energies(module, batches, maps)
    for m in range(5):
        found = torch.bincount(drawn[mover == m], minlength=energies.shape[1]) / 4000
        assert_close(found, energies[m] / energies[m].sum(), atol=0.035, rtol=0.0)


def test_uniform_draws_every_counted_token_whatever_it_moves():
    module, batches, maps = prepared()
    n_rows = sum(b.n_counted for b in batches)
    drawn = draw_sources(module, batches, maps * 0, torch.zeros(9000).long(), "uniform", torch.Generator())
    assert torch.bincount(drawn, minlength=n_rows).min() > 0
    assert len(torch.bincount(drawn)) == n_rows


def test_a_mover_that_moves_nothing_draws_from_all_tokens_alike():
    module, batches, maps = prepared()
    drawn = draw_sources(module, batches, maps * 0, torch.zeros(9000).long(), "energy", torch.Generator())
    assert torch.bincount(drawn, minlength=sum(b.n_counted for b in batches)).min() > 0


def test_features_start_on_the_only_token_that_a_head_moves():
    batches = [random_batch(seed) for seed in range(3)]
    for b in batches:  # from position 5 on, the first head attends to position 4 of the first context alone
        b[PATTERN][:, 0] = torch.eye(9)
        b[PATTERN][:, 0, :, 0] = 1.0
        b[PATTERN][:, 0, 1:, 1:] = 0.0
    batches[0][PATTERN][0, 0, 5:, 4] = 1.0
    module, batches, maps = prepared(batches=batches)
    drawn = draw_sources(module, batches, maps, torch.ones(50).long(), "energy", torch.Generator())
    assert (drawn == 3).all()


def test_the_value_map_is_the_linear_map_that_made_the_values():
    batches = [random_batch(seed) for seed in range(6)]
    x = torch.cat([b[Site(2, "resid_in")][b.mask] for b in batches])
    x = x - x.mean(0)
    values = torch.cat([b[Site(2, "v")].transpose(1, 2)[b.mask] for b in batches])
    found = torch.einsum("nd,dke->nke", x, value_map(x, batches, Site(2, "v")))
    assert_close(found, values - values.mean(0), atol=0.02, rtol=0.01)
