import pytest
import torch

from crosshead.analysis.references import ReferenceConfig, attention_references
from crosshead.dictionaries.base import Site
from tests.dictionaries.cases import random_batch, weights


@pytest.fixture(scope="module")
def result():
    config = ReferenceConfig(ranks=(1, 4, 8, 12, 20), train_contexts=20)
    train = [random_batch(seed, n_contexts=10) for seed in range(6)]
    return attention_references(train, [random_batch(50, n_contexts=10)], 2, weights()[2], config)


def test_keeping_every_axis_of_every_head_is_exact(result):
    assert result["linear_top1"][-1]["rank"] == 20
    assert result["linear_top1"][-1]["normalised_mse"] < 1e-6


def test_more_axes_are_never_worse_and_svd_bounds_them(result):
    linear = [point["normalised_mse"] for point in result["linear_top1"]]
    svd = [point["normalised_mse"] for point in result["svd"]]
    assert linear == sorted(linear, reverse=True)
    assert svd[3] < 1e-6  # rank 12 is the whole space


def test_sample_sizes_are_stated(result):
    assert result["n_tokens"] == 10 * 8
    assert result["n_train_tokens"] == 6 * 10 * 8


def test_the_bos_reference_is_the_exact_contribution_of_the_first_token():
    train = [random_batch(seed, n_contexts=10) for seed in range(3)]
    heldout = random_batch(9, n_contexts=10)
    out = attention_references(train, [heldout], 2, weights()[2], ReferenceConfig(ranks=(1,)))
    layer = weights()[2]

    def first(batch):
        z = batch[Site(2, "pattern")][..., :1] * batch[Site(2, "v")].repeat_interleave(2, dim=1)[:, :, :1]
        return torch.einsum("bhte,hed->btd", z, layer.W_O)[batch.mask]

    y = torch.cat([b[Site(2, "attn_out")][b.mask] for b in train])
    mean, mean_first = y.mean(0), torch.cat([first(b) for b in train]).mean(0)
    target = heldout[Site(2, "attn_out")][heldout.mask]
    error = (target - (mean + first(heldout) - mean_first)).square().sum()
    assert out["bos_only"] == pytest.approx(float(error / (target - mean).square().sum()), rel=1e-4)
