import pytest
import torch
from torch.testing import assert_close

from crosshead.attention.pairs import pair_scores
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine

B, T, C, G, Q = 3, 7, 5, 2, 4
SPARSE, DENSE = Engine(form="sparse"), Engine(form="dense")


def some(distances: int, density: float = 0.4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dense = [draw(B * T, C) * (torch.rand(B * T, C, generator=generator) < density) for _ in range(2)]
    codes = [SparseCodes.from_dense(x) for x in dense]
    return codes[0], codes[1], draw(C, G, Q), draw(distances, Q)


def by_hand(query: SparseCodes, key: SparseCodes, coefficients: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    u, v = (codes.to_dense().view(B, T, C) for codes in (query, key))
    scores = torch.zeros(B, G, T, T, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for s in range(t + 1):
                kernel = coefficients @ basis[t - s if len(basis) > 1 else 0]
                scores[b, :, t, s] = (u[b, t] * v[b, s]) @ kernel
    return scores


@pytest.mark.parametrize("engine", [SPARSE, DENSE])
@pytest.mark.parametrize("distances", [T, 1, T + 3])
def test_scores_equal_the_sum_over_pairs(distances, engine):
    query, key, coefficients, basis = some(distances)
    assert_close(pair_scores(query, key, coefficients, basis, T, engine), by_hand(query, key, coefficients, basis))


@pytest.mark.parametrize("engine", [SPARSE, DENSE])
@pytest.mark.parametrize("distances", [T, 1])
def test_gradients_equal_finite_differences(distances, engine):
    query, key, coefficients, basis = some(distances, seed=1)

    def scores(u, v, own):
        return pair_scores(query.with_values(u), key.with_values(v), own, basis, T, engine)

    inputs = [x.detach().clone().requires_grad_() for x in (query.values, key.values, coefficients)]
    assert torch.autograd.gradcheck(scores, inputs, fast_mode=True)


def test_one_head_takes_the_same_path_as_several():
    query, key, coefficients, basis = some(T)
    one = pair_scores(query, key, coefficients[:, :1], basis, T, SPARSE)
    assert_close(one[:, 0], pair_scores(query, key, coefficients, basis, T, SPARSE)[:, 0])


def test_the_number_of_threads_changes_no_bit():
    query, key, coefficients, basis = some(T, density=0.9)
    results, before = [], torch.get_num_threads()
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        inputs = [x.detach().clone().requires_grad_() for x in (query.values, key.values, coefficients)]
        scores = pair_scores(query.with_values(inputs[0]), key.with_values(inputs[1]), inputs[2], basis, T, SPARSE)
        scores.square().sum().backward()
        results.append([scores, *(x.grad for x in inputs)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_codes_and_kernels_that_do_not_fit_are_refused():
    query, key, coefficients, basis = some(T)
    with pytest.raises(ValueError, match="whole contexts of 6 positions"):
        pair_scores(query, key, coefficients, basis, 6)
    with pytest.raises(ValueError, match="knows 5 distances, the context has 7"):
        pair_scores(query, key, coefficients, basis[:5], T)


def test_dense_scores_keep_no_product_per_basis_function():
    query, key, coefficients, basis = some(T)
    query.values.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        pair_scores(query, key, coefficients.requires_grad_(), basis, T, DENSE)
    assert sum(x.shape == (B, T, C) for x in kept) <= 2 * G
