import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from crosshead.dictionaries.sparsity import (
    L1,
    BatchTopK,
    JumpReLU,
    TopK,
    annealed_k,
    batch_topk_threshold,
    folded_sparsity,
    select,
    warm_coefficient,
)
from crosshead.maths.engine import Engine
from crosshead.maths.forms import Product
from crosshead.maths.scan import largest_entries

SETTLED_TOPK = TopK(k=3, anneal_from=1.0)
SETTLED_BATCH_TOPK = BatchTopK(k=3, anneal_from=1.0)


def problem(seed: int, n_rows=11, n_features=17, positive_share=0.5, ties=False):
    generator = torch.Generator().manual_seed(seed)
    pre = torch.rand(n_rows, n_features, generator=generator)
    if ties:
        pre = (pre * 4).ceil() / 4
    pre = torch.where(torch.rand(pre.shape, generator=generator) < positive_share, pre, -pre)
    norms = torch.ones(n_features) if ties else torch.rand(n_features, generator=generator) + 0.1
    mask = torch.rand(n_rows, generator=generator) < 0.7
    return pre, norms, mask


def entries(codes) -> list[tuple[int, int]]:
    return list(zip(codes.rows.tolist(), codes.columns.tolist(), strict=True))


def select_entries(pre, norms, mask, sparsity, threshold=0.0, by_threshold=False, progress=1.0):
    threshold = torch.as_tensor(threshold)
    features = pre.shape[1]
    product = Product(pre, torch.eye(features), torch.zeros(features), mask)
    codes = select(product, norms, sparsity, threshold=threshold, by_threshold=by_threshold, progress=progress,
                   engine=Engine())  # fmt: skip
    assert (codes.n_rows, codes.n_features) == pre.shape
    assert entries(codes) == sorted(set(entries(codes))), "entries are sorted by row and column, each once"
    assert torch.equal(codes.values, pre[codes.rows, codes.columns])
    return entries(codes)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of the largest positive scores, by the function that searches a product."""
    product = Product(torch.ones(1, 1), scores[:, None], torch.zeros(len(scores)), torch.ones(1, dtype=torch.bool))
    return largest_entries(product, torch.ones(len(scores)), count, Engine(tile_mib=0.004)).columns


def candidates(pre, norms, mask, rows=None):
    """Every entry that may become active with its score, best first."""
    rows = range(len(pre)) if rows is None else rows
    scored = [(float(pre[n, i] * norms[i]), (n, i)) for n in rows if mask[n] for i in range(pre.shape[1])]
    return sorted((pair for pair in scored if pair[0] > 0), reverse=True)


@pytest.mark.parametrize("positive_share", [0.0, 0.02, 0.2, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_batch_topk_takes_the_best_entries_of_the_counted_rows(seed, positive_share):
    pre, norms, mask = problem(seed, positive_share=positive_share)
    expected = [entry for _, entry in candidates(pre, norms, mask)][: 3 * int(mask.sum())]
    assert select_entries(pre, norms, mask, SETTLED_BATCH_TOPK) == sorted(expected)


@pytest.mark.parametrize("by_threshold", [True, False])
@pytest.mark.parametrize("positive_share", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_topk_takes_the_best_entries_of_every_counted_row(seed, positive_share, by_threshold):
    pre, norms, mask = problem(seed, positive_share=positive_share)
    expected = [entry for n in range(len(pre)) for _, entry in candidates(pre, norms, mask, [n])[:3]]
    assert select_entries(pre, norms, mask, SETTLED_TOPK, by_threshold=by_threshold) == sorted(expected)


@pytest.mark.parametrize("seed", range(5))
def test_ties_are_broken_but_never_change_how_many_and_how_large(seed):
    pre, norms, mask = problem(seed, ties=True)
    for sparsity, groups in ((SETTLED_BATCH_TOPK, [range(11)]), (SETTLED_TOPK, [[n] for n in range(11)])):
        chosen = select_entries(pre, norms, mask, sparsity)
        for rows in groups:
            wanted = 3 * int(mask[list(rows)].sum())
            best = [score for score, _ in candidates(pre, norms, mask, rows)][:wanted]
            assert sorted((float(pre[n, i]) for n, i in chosen if n in rows), reverse=True) == best


@pytest.mark.parametrize("seed", range(3))
def test_l1_takes_every_positive_entry_and_jumprelu_every_one_above_its_threshold(seed):
    pre, norms, mask = problem(seed)
    assert select_entries(pre, norms, mask, L1(coefficient=1.0)) == sorted(e for _, e in candidates(pre, norms, mask))
    theta = torch.rand(17)
    expected = [(n, i) for n in range(11) if mask[n] for i in range(17) if pre[n, i] > theta[i]]
    for by_threshold in (True, False):
        chosen = select_entries(pre, norms, mask, JumpReLU(coefficient=1.0), theta, by_threshold=by_threshold)
        assert chosen == expected


@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_batch_topk_at_inference_compares_with_the_threshold_and_not_with_the_batch(threshold):
    pre, norms, mask = problem(4)
    expected = sorted(entry for score, entry in candidates(pre, norms, mask) if score > threshold)
    assert select_entries(pre, norms, mask, SETTLED_BATCH_TOPK, threshold, by_threshold=True) == expected
    alone = select_entries(pre[:5], norms, mask[:5], SETTLED_BATCH_TOPK, threshold, by_threshold=True)
    assert alone == [(n, i) for n, i in expected if n < 5]


def test_no_counted_row_gives_no_entry():
    pre, norms, mask = problem(0)
    for sparsity in (SETTLED_TOPK, SETTLED_BATCH_TOPK, L1(coefficient=1.0), JumpReLU(coefficient=1.0)):
        assert select_entries(pre, norms, torch.zeros_like(mask), sparsity, torch.zeros(17)) == []


def test_the_start_of_training_takes_the_multiple_of_k_and_no_more_than_all_features():
    pre, norms, mask = problem(0, positive_share=1.0)
    counted = int(mask.sum())
    assert len(select_entries(pre, norms, mask, TopK(k=3, anneal_from=4.0), progress=0.0)) == 12 * counted
    assert len(select_entries(pre, norms, mask, BatchTopK(k=3, anneal_from=4.0), progress=0.0)) == 12 * counted
    assert len(select_entries(pre, norms, mask, TopK(k=3, anneal_from=9.0), progress=0.0)) == 17 * counted
    assert len(select_entries(pre, norms, mask, TopK(k=3), progress=0.0, by_threshold=True)) == 3 * counted


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 3000),
    positive_share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    levels=st.sampled_from([1, 3, 50, 10**6]),
    count_share=st.floats(0, 1.2),
    sampled_low=st.booleans(),
)
def test_largest_equals_a_full_sort(seed, size, positive_share, levels, count_share, sampled_low):
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.rand(size, generator=generator) * levels).ceil() / levels
    scores *= torch.rand(size, generator=generator) < positive_share
    if sampled_low:
        scores[:: max(1, size // 128)] *= 0.01  # the sample that the floor is guessed from
    count = round(size * count_share)
    chosen = largest(scores, count)
    assert (chosen.diff() > 0).all()
    best = scores.sort(descending=True).values[:count]
    assert torch.equal(scores[chosen].sort(descending=True).values, best[best > 0])


def test_a_sample_that_is_too_high_does_not_lose_entries():
    scores = torch.linspace(0.1, 0.2, 3200)
    scores[:: 3200 // 128] = 5.0  # the sample that the floor is guessed from
    chosen = largest(scores, 1000)
    assert torch.equal(scores[chosen].sort().values, scores.sort().values[-1000:])


def test_k_falls_linearly_to_its_end_value_and_stays():
    sparsity = TopK(k=10, anneal_from=4.0, anneal_fraction=0.5)
    expected = {0.0: 40.0, 0.25: 25.0, 0.5: 10.0, 0.75: 10.0, 1.0: 10.0}
    for progress, k in expected.items():
        assert annealed_k(sparsity, progress) == pytest.approx(k)
    assert annealed_k(TopK(k=10, anneal_fraction=0.0), 0.0) == 10.0


def test_penalties_rise_linearly_to_their_end_value_and_stay():
    for form in (L1(coefficient=1.0, warmup_fraction=0.2), JumpReLU(coefficient=1.0, warmup_fraction=0.2)):
        assert [warm_coefficient(form, progress) for progress in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert warm_coefficient(L1(coefficient=1.0, warmup_fraction=0.0), 0.0) == 1.0


@pytest.mark.parametrize("count", [0, 1, 17, 39])
def test_exactly_the_wanted_number_of_scores_exceeds_the_threshold(count):
    scores = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.01
    threshold = batch_topk_threshold(list(scores.split(7)), count)
    assert int((scores > threshold).sum()) == count


def test_the_threshold_is_zero_where_fewer_scores_than_wanted_are_positive():
    assert batch_topk_threshold([torch.tensor([0.3, 0.2])], 5) == 0.0
    assert batch_topk_threshold([torch.tensor([0.3, -0.1, -0.2, 0.2])], 3) == 0.0
    assert batch_topk_threshold([torch.tensor([])], 3) == 0.0


def test_the_threshold_with_ties_lets_no_more_through_than_wanted():
    scores = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.5])
    threshold = batch_topk_threshold([scores], 3)
    assert_close(threshold, torch.tensor(0.2))
    assert int((scores > threshold).sum()) == 1


def test_only_batch_topk_changes_its_form_when_units_change():
    for sparsity in (L1(coefficient=1.0), TopK(k=3), JumpReLU(coefficient=1.0)):
        assert folded_sparsity(sparsity) is sparsity
    assert folded_sparsity(BatchTopK(k=3)) == JumpReLU(coefficient=0.0, start_l0=3.0)
