import pytest
import torch
from torch.testing import assert_close

from crosshead.dictionaries.encoder import SparseEncoder
from crosshead.dictionaries.sparsity import L1, BatchTopK, JumpReLU, TopK


def random_encoder(sparsity, d_in=6, features=20, seed=0) -> SparseEncoder:
    encoder = SparseEncoder(d_in, features, sparsity)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return encoder


@pytest.mark.parametrize("sparsity", [TopK(k=4), BatchTopK(k=4), L1(coefficient=1.0, start_l0=4.0),
                                      JumpReLU(coefficient=1.0, start_l0=4.0)])  # fmt: skip
def test_every_feature_starts_active_on_the_wanted_share_with_unit_rms(sparsity):
    encoder = random_encoder(sparsity)
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1)) * 3
    directions = torch.nn.functional.normalize(encoder.weight.detach().clone(), dim=1)
    encoder.start_bias_(x)
    pre = (x @ encoder.weight.T + encoder.bias).detach()
    active = torch.relu(pre)
    # 4 of 20 features on average: every feature on a fifth of the rows. The next row has a pre-activation of 0.
    assert torch.equal((pre > 1e-5).sum(0), torch.full((20,), 100))
    assert_close(active.square().sum(0).div(100).sqrt(), torch.ones(20), rtol=1e-4, atol=1e-4)
    assert_close(torch.nn.functional.normalize(encoder.weight.detach(), dim=1), directions)


def test_the_start_covers_more_features_than_one_block_and_keeps_a_row_free_at_the_extremes():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)).double()
    for l0, active in ((2000.0, 39), (0.001, 2)):  # more and less than the rows can give
        encoder = random_encoder(L1(coefficient=1.0, start_l0=l0), d_in=3, features=1500).double()
        encoder.start_bias_(x)
        pre = (x @ encoder.weight.T + encoder.bias).detach()
        assert torch.equal((pre > 1e-9).sum(0), torch.full((1500,), active))


@pytest.mark.parametrize("k", [1, 4, 19])
def test_the_calibrated_threshold_gives_k_active_features_on_average(k):
    encoder = random_encoder(BatchTopK(k=k)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        encoder.bias += 8.0  # enough positive scores
    norms = torch.rand(20, generator=generator) + 0.5
    rows = [(torch.randn(30, 6, generator=generator), torch.rand(30, generator=generator) < 0.8) for _ in range(3)]
    encoder.calibrate_(rows, norms)
    active = sum(len(encoder(x, mask, norms).codes.values) for x, mask in rows)
    assert active == k * sum(int(mask.sum()) for _, mask in rows)


def test_calibration_leaves_other_sparsities_alone():
    encoder = random_encoder(TopK(k=3))
    encoder.calibrate_([(torch.randn(5, 6), torch.ones(5, dtype=torch.bool))], torch.ones(20))
    assert encoder.threshold == 0


def test_jumprelu_is_zero_in_the_band_below_its_threshold_and_the_band_exists_in_training_only():
    encoder = random_encoder(JumpReLU(coefficient=1.0, bandwidth=0.5))
    x, mask, norms = torch.randn(200, 6), torch.ones(200, dtype=torch.bool), torch.ones(20)
    pre, theta = (x @ encoder.weight.T + encoder.bias).detach(), encoder.log_threshold.detach().exp()
    expected = pre * (pre > theta)
    training = encoder.train()(x, mask, norms).codes
    assert_close(training.to_dense().detach(), expected)
    assert len(training.values) == int((pre > theta - 0.25).sum())
    inference = encoder.eval()(x, mask, norms).codes
    assert_close(inference.to_dense().detach(), expected)
    assert len(inference.values) == int((pre > theta).sum())


def test_penalties_of_topk_are_none():
    encoder = random_encoder(TopK(k=3))
    x, mask, norms = torch.randn(5, 6), torch.ones(5, dtype=torch.bool), torch.ones(20)
    assert encoder.penalties(encoder(x, mask, norms), norms, 5) == {}


@pytest.mark.parametrize("sparsity", [L1(coefficient=1.0), TopK(k=3), BatchTopK(k=3), JumpReLU(coefficient=1.0)])
def test_folded_state_gives_the_same_preactivations_for_raw_inputs(sparsity):
    encoder = random_encoder(sparsity).double()
    generator = torch.Generator().manual_seed(3)
    raw, mean = torch.randn(9, 6, generator=generator).double(), torch.randn(6, generator=generator).double() * 5
    scale = torch.rand(6, generator=generator).double() + 0.1
    norms = torch.rand(20, generator=generator).double()
    norms[4] = 0.0
    encoder.threshold.fill_(0.3)
    state = encoder.folded_state(mean, scale, norms)
    assert_close(raw @ state["weight"].T + state["bias"], ((raw - mean) * scale) @ encoder.weight.T + encoder.bias)
    if isinstance(sparsity, BatchTopK):
        writing = norms > 0
        assert_close(state["log_threshold"].exp()[writing], 0.3 / norms[writing])
        assert state["log_threshold"].isfinite().all()
        assert state["log_threshold"].exp()[4] > 1e30
