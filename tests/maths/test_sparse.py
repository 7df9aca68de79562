"""The sparse engine against dense float64 autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from crosshead.maths import on_cpu
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product
from crosshead.maths.scan import larger_entries, largest_entries, largest_per_row
from crosshead.maths.sparse import decode, encode, mixed_decode

FORMS = [Engine(form="sparse"), Engine(form="dense")]
both_forms = pytest.mark.parametrize("engine", FORMS, ids=["sparse", "dense"])


class Problem:
    """Random tensors of one layer; ``active`` has an empty row and a dead feature, ``mask`` leaves out a position."""

    def __init__(self, seed, density, contexts=2, positions=7, features=17, d_in=5, d_out=6, heads=3,
                 dtype=torch.float64, device="cpu"):  # fmt: skip
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, rows = dtype, contexts * positions
        self.x, self.weight, self.bias = self.draw(rows, d_in), self.draw(features, d_in), self.draw(features)
        self.loadings, self.decoder = self.draw(heads + 1, features), self.draw(features, d_out)
        self.patterns = torch.softmax(self.draw(contexts, heads, positions, positions), -1)  # not causal: that is cut
        self.mask = self.uniform(rows) < 0.9
        self.active = self.uniform(rows, features) < density
        self.active &= self.mask[:, None]
        self.active[0], self.active[:, features // 2] = False, False
        self.movers = self.uniform(heads + 1, features) < 0.4

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator).to(self.device)


problems = st.builds(
    Problem, seed=st.integers(0, 2**31), density=st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0]),
    contexts=st.integers(1, 3), positions=st.sampled_from([1, 2, 9, 130]), features=st.integers(1, 40),
    d_in=st.integers(1, 9), d_out=st.integers(1, 9), heads=st.integers(1, 9),
)  # fmt: skip


def leaves(*tensors, dtype=torch.float64):
    return [t.detach().to(dtype).clone().requires_grad_() for t in tensors]


def whole(p: Problem, parameters, engine, movers=None, with_sums=True):
    """Encode, decode through heads, and both sums that penalties are made of."""
    x, weight, bias, loadings, decoder, patterns = parameters
    dense = (x @ weight.T + bias).detach()
    product = Product(x, weight, bias, p.mask)
    pre, sums = encode(product, SparseCodes.from_dense(dense, p.active), engine, with_sums=with_sums)
    y = mixed_decode(pre, loadings, decoder, patterns, engine, movers)
    return y, decode(pre, decoder, engine), pre.feature_sums(), sums


def oracle(p: Problem, parameters, movers=None):
    x, weight, bias, loadings, decoder, patterns = parameters
    pre = x @ weight.T + bias
    f = pre * p.active
    if movers is not None:
        loadings = loadings * movers
    f_BTF = f.view(len(patterns), patterns.shape[-1], -1)
    y = f_BTF * loadings[0] @ decoder
    for h in range(patterns.shape[1]):
        y = y + patterns[:, h].tril() @ ((f_BTF * loadings[h + 1]) @ decoder)
    return y, f @ decoder, f.sum(0), (pre * p.mask[:, None]).sum(0)


def compare(p: Problem, engine, tolerance, movers=None):
    tensors = (p.x, p.weight, p.bias, p.loadings, p.decoder, p.patterns)
    ours_in, oracle_in = leaves(*tensors, dtype=p.dtype), leaves(*tensors)
    ours, expected = whole(p, ours_in, engine, movers), oracle(p, oracle_in, movers)
    upstream = [p.draw(*t.shape).double() for t in expected]
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() + 1e-30)
    ours_g = torch.autograd.grad(sum((a * u.to(p.dtype)).sum() for a, u in zip(ours, upstream, strict=True)), ours_in)
    oracle_g = torch.autograd.grad(sum((b * u).sum() for b, u in zip(expected, upstream, strict=True)), oracle_in)
    names = ("x", "weight", "bias", "loadings", "decoder", "patterns")
    scale = max(float(g.norm()) for g in oracle_g)
    for name, a, b in zip(names, ours_g, oracle_g, strict=True):
        assert (a - b).norm() <= tolerance * (float(b.norm()) + 1e-3 * scale), name


@both_forms
@settings(max_examples=60, deadline=None)
@given(p=problems, few=st.booleans())
def test_every_gradient_equals_dense_autograd_in_float64(engine, p, few):
    compare(p, engine, 1e-10, p.movers if few else None)


@both_forms
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("few", [False, True])
def test_every_gradient_agrees_in_float32(engine, density, few):
    p = Problem(3, density, contexts=2, positions=150, features=64, d_in=33, d_out=40, heads=9, dtype=torch.float32)
    compare(p, engine, 1e-5, p.movers if few else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("few", [False, True])
def test_no_bit_of_the_loops_depends_on_the_number_of_threads(few, dtype):
    p = Problem(4, 0.3, contexts=2, positions=40, features=31, d_out=70, heads=5, dtype=dtype)
    codes = SparseCodes.from_dense(p.draw(80, 31) * p.active)
    mixing = Mixing.of(codes, p.loadings, p.decoder, p.movers if few else None)
    grad, shares = p.draw(80, 70), p.draw(80, 6, 70)

    def outcome(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            mixed, into = torch.empty_like(shares), MixGradients(codes.values.clone(), p.loadings.T.contiguous(),
                                                                 p.decoder.clone())  # fmt: skip
            on_cpu.mix(mixing, mixed, 0, 80)
            on_cpu.unmix(mixing, shares, 0, 80, into)
            columns = on_cpu.weighted_columns(codes, grad, p.bias, grad[0])
            return mixed, *into, columns, on_cpu.weighted_rows(codes, p.decoder), *on_cpu.decode_gradients(
                codes, grad, p.decoder)  # fmt: skip
        finally:
            torch.set_num_threads(before)

    alone = outcome(1)
    for threads in (2, 3, 100):
        assert all(torch.equal(a, b) for a, b in zip(outcome(threads), alone, strict=True))


@pytest.mark.parametrize("tile_mib", [1e-6, 3e-4, 1e-3, 8.0])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(1, 30), features=st.integers(1, 50), k=st.integers(0, 60))
def test_selections_are_those_of_full_sorts_whatever_the_tiles(tile_mib, seed, rows, features, k):
    engine = Engine(tile_mib=tile_mib)
    p = Problem(seed, 0.5, contexts=1, positions=rows, features=features)
    scale = torch.rand(features, generator=p.generator, dtype=torch.float64)
    level = torch.randn(features, generator=p.generator, dtype=torch.float64)
    product = Product(p.x, p.weight, p.bias, p.mask)
    pre = p.x @ p.weight.T + p.bias
    scores = pre * scale * p.mask[:, None]

    larger = larger_entries(product, scale, level, engine)
    active = (pre * scale > level) & p.mask[:, None]
    assert_close(larger.to_dense(), pre * active)
    assert torch.equal(larger.rows, torch.nonzero(active)[:, 0])
    assert torch.equal(larger.columns, torch.nonzero(active)[:, 1])

    ranks = (-scores).argsort(dim=1, stable=True).argsort(dim=1)
    assert_close(largest_per_row(product, scale, k, engine).to_dense(), pre * ((ranks < k) & (scores > 0)))

    order = (-scores.flatten()).argsort(stable=True)[: k * rows // 2]
    chosen = torch.zeros_like(scores, dtype=torch.bool).view(-1).index_fill_(0, order, True).view_as(scores)
    assert_close(largest_entries(product, scale, k * rows // 2, engine).to_dense(), pre * (chosen & (scores > 0)))


def test_a_sample_unlike_the_rest_only_costs_time():
    p = Problem(1, 0.5, contexts=1, positions=40, features=1024)
    p.weight[::4] *= 100.0  # the features of the sample have scores far above all others
    product, scale = Product(p.x, p.weight, p.bias, p.mask), torch.ones(1024, dtype=torch.float64)
    scores = ((p.x @ p.weight.T + p.bias) * p.mask[:, None]).flatten()
    best = scores[scores > 0].sort(descending=True).values
    for count in (5000, 10000, len(best), len(best) + 10):
        codes = largest_entries(product, scale, count, Engine())
        assert len(codes.values) == min(count, len(best))
        assert_close(codes.values.sum(), best[:count].sum())


def test_equal_scores_keep_the_first_columns_of_a_row():
    product = Product(torch.ones(1, 1), torch.ones(9, 1), torch.zeros(9), torch.ones(1, dtype=torch.bool))
    scale = torch.tensor([1.0, 2, 1, 1, 2, 1, 1, 1, 1])
    assert largest_per_row(product, scale, 4, Engine()).columns.tolist() == [0, 1, 2, 4]
    assert largest_entries(product, scale, 4, Engine()).columns.tolist() == [0, 1, 2, 4]


@both_forms
def test_penalty_on_negative_preactivations_has_the_exact_sparse_gradient(engine):
    p = Problem(3, 0.5)
    coefficient = torch.linspace(0.1, 1.0, len(p.bias), dtype=torch.float64)
    weight, bias = leaves(p.weight, p.bias)
    pre = p.x @ weight.T + bias
    expected = ((torch.relu(-pre) * p.mask[:, None]).sum(0) * coefficient).sum()
    product = Product(p.x, weight, bias, p.mask)
    structure = larger_entries(product, torch.ones_like(bias), torch.zeros_like(bias), engine)
    codes, sums = encode(product, structure, engine, with_sums=True)
    ours = ((codes.feature_sums() - sums) * coefficient).sum()
    assert_close(ours, expected)
    for a, b in zip(
        torch.autograd.grad(ours, (weight, bias)), torch.autograd.grad(expected, (weight, bias)), strict=True
    ):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_to_dense_round_trips():
    active = Problem(5, 0.3).active
    dense = torch.randn(active.shape, dtype=torch.float64) * active
    assert torch.equal(SparseCodes.from_dense(dense).to_dense(), dense)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_offsets_orders_and_sums_are_those_of_the_dense_matrix(density):
    active = Problem(7, density).active
    dense = torch.randn(active.shape, dtype=torch.float64) * active
    codes = SparseCodes.from_dense(dense, active)
    assert codes.row_offsets.tolist() == [int(active[:n].sum()) for n in range(len(active) + 1)]
    assert torch.equal(codes.rows, torch.nonzero(active)[:, 0])
    offsets, entries, rows = codes.by_column
    by_column = [(n, i) for i in range(active.shape[1]) for n in range(len(active)) if active[n, i]]
    assert list(zip(rows.tolist(), codes.columns[entries].tolist(), strict=True)) == by_column
    assert torch.equal(codes.rows[entries], rows)
    assert offsets.tolist() == [int(active[:, :i].sum()) for i in range(active.shape[1] + 1)]
    assert_close(codes.feature_sums(), dense.sum(0))
    assert torch.equal(codes.fired(), active.any(0))


def test_the_choice_between_forms_is_a_function_of_counts_and_costs_alone():
    auto = Engine()
    assert not auto.prefers_dense(1000, 8192, 10, 60 * 1000 * 10, 576)
    assert auto.prefers_dense(1000, 8192, 10, 8192 * 1000 * 10, 576)
    assert not Engine(form="sparse").prefers_dense(1, 1, 1, 1, 1)
    assert Engine(form="dense").prefers_dense(1000, 8192, 10, 1, 576)


def test_no_context_at_all_gives_nothing():
    p = Problem(1, 0.5)
    product = Product(p.x[:0], p.weight, p.bias, p.mask[:0])
    codes = largest_entries(product, torch.ones(17, dtype=torch.float64), 3, Engine())
    assert (codes.n_rows, len(codes.values)) == (0, 0)
    assert mixed_decode(codes, p.loadings, p.decoder, p.patterns[:0]).shape == (0, 7, 6)


def test_shapes_that_do_not_fit_are_refused():
    p = Problem(1, 0.5)
    codes = SparseCodes.from_dense(p.active.double())
    with pytest.raises(ValueError, match="patterns of shape"):
        mixed_decode(codes, p.loadings[:2], p.decoder, p.patterns)


def test_sums_per_feature_and_their_gradients_are_the_same_without_atomics():
    p = Problem(2, 0.2, contexts=2, positions=9, features=30)
    codes = SparseCodes.from_dense(p.active * 1.0)
    weights, results = p.draw(30), []
    for sums in (SparseCodes.feature_sums, SparseCodes._segment_sums):
        values = p.draw(0).new_tensor(range(len(codes.values))).requires_grad_()
        total = sums(codes.with_values(values))
        (gradient,) = torch.autograd.grad(total @ weights, values)
        results.append((total.detach(), gradient))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)
