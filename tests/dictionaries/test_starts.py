import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.starts import Moments, counted, ridge
from tests.dictionaries.cases import padded_batch


def regression(seed=0, n=50, d_in=6, d_out=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, d_out, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("strength", [1e-3, 0.5])
def test_ridge_is_least_squares_of_the_rows_and_a_penalty_row_per_coordinate(strength):
    x, y = regression()
    penalty = strength * torch.linalg.eigvalsh(x.T @ x).mean()
    stacked = torch.cat([x, penalty.sqrt() * torch.eye(6, dtype=torch.float64)])
    oracle = torch.linalg.lstsq(stacked, torch.cat([y, y.new_zeros(6, 3)])).solution
    assert_close(ridge(x, y, strength), oracle, rtol=1e-8, atol=1e-10)


def test_ridge_of_strength_zero_is_least_squares():
    x, y = regression()
    assert_close(ridge(x, y, 0.0), torch.linalg.lstsq(x, y).solution, rtol=1e-8, atol=1e-10)


def test_ridge_recovers_a_planted_map_and_answers_in_the_type_of_its_input():
    x, _ = regression()
    planted = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = ridge(x.float(), (x @ planted).float(), 1e-9)
    assert found.dtype == torch.float32
    assert_close(found, planted.float(), rtol=1e-4, atol=1e-4)


def test_ridge_ignores_a_coordinate_that_never_varies():
    x, y = regression()
    x[:, 2] = 0.0
    assert_close(ridge(x, y)[2], y.new_zeros(3))


def test_moments_centre_the_rows_and_scale_them_to_their_width():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 7, generator=generator) * torch.rand(7, generator=generator) + 4.0
    moments = Moments(rows.split(13))
    assert_close(moments.mean, rows.mean(0))
    scaled = (rows - moments.mean) * moments.scale
    assert float(scaled.square().sum(1).mean()) == pytest.approx(7.0, rel=1e-5)


def test_moments_of_a_large_mean_keep_a_small_variance():
    rows = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) + 1000.0
    expected = (5 / float((rows.double() - rows.double().mean(0)).square().sum(1).mean())) ** 0.5
    assert Moments([rows]).scale == pytest.approx(expected, rel=1e-6)


def test_moments_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"no counted positions in the start sample; raise training\.start_contexts"):
        Moments([torch.zeros(0, 4)])


def test_counted_keeps_the_rows_of_counted_positions_in_order():
    batch = padded_batch(0)
    x = torch.arange(batch.mask.numel() * 6, dtype=torch.float32).view(*batch.mask.shape, 2, 3)
    rows = [x[c, t].flatten() for c in range(len(x)) for t in range(x.shape[1]) if batch.mask[c, t]]
    assert torch.equal(counted(x, batch), torch.stack(rows))
    assert torch.equal(counted(x[..., 0, 0], batch), torch.stack([row[0] for row in rows]))
