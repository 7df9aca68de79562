import pytest
import torch
from torch.testing import assert_close

from crosshead.maths.sparse import SparseCodes, decode, gather_preactivations, moved_decode, preactivation_sums


def problem(density: float, seed: int, n=13, features=17, d_in=5, d_out=7, movers=3):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias = draw(n, d_in), draw(features, d_in), draw(features)
    loadings, decoder = draw(movers, features), draw(features, d_out)
    active = torch.rand(n, features, generator=generator) < density
    active[0] = False  # an empty row
    active[:, 1] = False  # a dead feature
    return x, weight, bias, loadings, decoder, active, draw(movers, n, d_out)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_moved_decode_and_encoder_gradients_equal_dense_autograd(density, seed):
    x, weight, bias, loadings, decoder, active, upstream = problem(density, seed)
    parameters = [t.clone().requires_grad_() for t in (x, weight, bias, loadings, decoder)]

    def sparse(x, weight, bias, loadings, decoder):
        dense = (x @ weight.T + bias).detach()
        codes = gather_preactivations(x, weight, bias, dense, SparseCodes.from_dense(dense, active))
        return moved_decode(codes, loadings, decoder)

    def dense(x, weight, bias, loadings, decoder):
        f = (x @ weight.T + bias) * active
        return torch.stack([(f * row) @ decoder for row in loadings])

    results = []
    for function in (sparse, dense):
        out = function(*parameters)
        results.append((out, torch.autograd.grad((out * upstream).sum(), parameters)))
    assert_close(results[0][0], results[1][0], rtol=1e-10, atol=1e-12)
    for ours, oracle in zip(results[0][1], results[1][1], strict=True):
        assert_close(ours, oracle, rtol=1e-10, atol=1e-12)


def test_penalty_on_negative_preactivations_has_the_exact_sparse_gradient():
    x, weight, bias, *_ = problem(0.5, 3)
    mask = torch.ones(len(x), dtype=torch.bool)
    mask[[2, 5]] = False
    coefficient = torch.linspace(0.1, 1.0, len(bias), dtype=torch.float64)
    weight.requires_grad_()
    bias.requires_grad_()

    pre = x @ weight.T + bias
    oracle = ((torch.relu(-pre) * mask[:, None]).sum(0) * coefficient).sum()
    active = (pre > 0) & mask[:, None]
    codes = gather_preactivations(x, weight, bias, pre.detach(), SparseCodes.from_dense(pre.detach(), active))
    sums = codes.feature_sums() - preactivation_sums(x, weight, bias, mask)
    ours = (sums * coefficient).sum()

    assert_close(ours, oracle)
    for a, b in zip(
        torch.autograd.grad(ours, (weight, bias)), torch.autograd.grad(oracle, (weight, bias)), strict=True
    ):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_decode_is_the_dense_product():
    *_, decoder, active, _ = problem(0.3, 4)
    dense = torch.randn(active.shape, dtype=torch.float64) * active
    assert_close(decode(SparseCodes.from_dense(dense), decoder), dense @ decoder)


def test_to_dense_round_trips():
    *_, active, _ = problem(0.3, 5)
    dense = torch.randn(active.shape, dtype=torch.float64) * active
    assert torch.equal(SparseCodes.from_dense(dense).to_dense(), dense)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_offsets_orders_and_sums_are_those_of_the_dense_matrix(density):
    *_, active, _ = problem(density, 7)
    dense = torch.randn(active.shape, dtype=torch.float64) * active
    codes = SparseCodes.from_dense(dense, active)
    assert codes.row_offsets.tolist() == [int(active[:n].sum()) for n in range(len(active) + 1)]
    order, column_offsets = codes.by_column
    by_column = [(n, i) for i in range(active.shape[1]) for n in range(len(active)) if active[n, i]]
    assert list(zip(codes.rows[order].tolist(), codes.columns[order].tolist(), strict=True)) == by_column
    assert column_offsets.tolist() == [int(active[:, :i].sum()) for i in range(active.shape[1] + 1)]
    assert_close(codes.feature_sums(), dense.sum(0))
    assert torch.equal(codes.fired(), active.any(0))


def test_float32_gradients_agree_to_1e_5():
    x, weight, bias, loadings, decoder, active, upstream = (t if t.dtype == torch.bool else t.float()
                                                            for t in problem(0.2, 6, n=64, features=128))  # fmt: skip
    parameters = [t.clone().requires_grad_() for t in (x, weight, bias, loadings, decoder)]
    dense = (parameters[0] @ parameters[1].T + parameters[2]).detach()
    codes = gather_preactivations(*parameters[:3], dense, SparseCodes.from_dense(dense, active))
    ours = torch.autograd.grad((moved_decode(codes, *parameters[3:]) * upstream).sum(), parameters)
    x64, w64, b64, l64, d64 = (t.detach().double().requires_grad_() for t in parameters)
    f = (x64 @ w64.T + b64) * active
    out = torch.stack([(f * row) @ d64 for row in l64])
    oracle = torch.autograd.grad((out * upstream.double()).sum(), (x64, w64, b64, l64, d64))
    for a, b in zip(ours, oracle, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_moves_left_out_change_no_bit_where_their_loadings_are_zero(density):
    generator = torch.Generator().manual_seed(3)
    dense = torch.rand(11, 7, generator=generator) * (torch.rand(11, 7, generator=generator) < density)
    movers = torch.rand(4, 7, generator=generator) < 0.4
    loadings = torch.randn(4, 7, generator=generator) * movers
    decoder, upstream = torch.randn(7, 5, generator=generator), torch.randn(4, 11, 5, generator=generator)

    def outcome(chosen):
        codes = SparseCodes.from_dense(dense)
        leaves = [t.clone().requires_grad_() for t in (codes.values, loadings, decoder)]
        moved = moved_decode(codes.with_values(leaves[0]), leaves[1], leaves[2], chosen)
        return moved, torch.autograd.grad((moved * upstream).sum(), leaves)

    moved, (values, own, rows) = outcome(movers)
    all_moved, (all_values, all_own, all_rows) = outcome(None)
    assert torch.equal(moved, all_moved)
    assert torch.equal(values, all_values)
    assert torch.equal(rows, all_rows)
    assert torch.equal(own, all_own * movers), "loadings of moves left out have no gradient"
