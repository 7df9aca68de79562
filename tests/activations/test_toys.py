import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.cache import ActivationCache
from crosshead.activations.toys import ToyConfig, _generator, _Task, train_toy
from crosshead.dictionaries.base import Site

QUICK = ToyConfig(sources=3, destinations=4, heads=3, fillers=3, context_length=8, steps=600, train_contexts=20,
                  heldout_contexts=64)  # fmt: skip
KINDS = ("skip_trigram", "ov_coherent")


def test_answers_of_skip_trigrams_depend_on_source_and_destination():
    task = _Task.of("skip_trigram", QUICK, _generator("skip_trigram", 0, "task"))
    assert all(sorted(row) == [0, 1, 2, 3] for row in task.table.tolist())
    tokens, answers = task.draw(200, _generator("skip_trigram", 0, "draw"))
    for row, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        (source,) = [token - 1 for token in row if 1 <= token <= 3]
        assert wanted[:4] == [-1] * 4
        assert wanted[4:] == [int(task.table[source, token - 4]) for token in row[4:]]


def test_answers_of_pairs_depend_on_both_signals_in_either_order():
    task = _Task.of("ov_coherent", QUICK, _generator("ov_coherent", 0, "task"))
    assert torch.equal(task.table, task.table.T)
    assert sorted(task.table[torch.ones(3, 3).triu() > 0].tolist()) == list(range(6))
    tokens, answers = task.draw(200, _generator("ov_coherent", 0, "draw"))
    for row, wanted in zip(tokens.tolist(), answers.tolist(), strict=True):
        first, second = [token - 1 for token in row if 1 <= token <= 3]
        assert row[4:] == [4] * 4
        assert wanted == [-1] * 4 + [int(task.table[first, second])] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_toy_learns_its_task_and_its_cache_holds_its_activations(kind, tmp_path):
    toy = train_toy(kind, 0, QUICK)
    assert toy.accuracy > 0.9
    assert toy.loss < 0.4
    toy.write(tmp_path / "cache")
    cache = ActivationCache.open(tmp_path / "cache", verify="sha256")
    names = ("resid_in", "pattern", "v", "attn_out")
    found = cache.read("heldout", range(5), [Site(0, name) for name in names])
    W_O, b_O = cache.weights()[0]
    moved = torch.einsum("bhts,bhse,hed->btd", found[Site(0, "pattern")], found[Site(0, "v")], W_O) + b_O
    assert_close(moved, found[Site(0, "attn_out")], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("two_threads")
def test_equal_seeds_give_equal_toys_on_two_threads():
    """A gradient added by several threads at once would differ from the one that torch adds in a fixed order."""
    short = QUICK.model_copy(update={"steps": 20})
    one, other, third = (train_toy("skip_trigram", seed, short) for seed in (1, 1, 2))
    torch.use_deterministic_algorithms(True)
    try:
        ordered = train_toy("skip_trigram", 1, short)
    finally:
        torch.use_deterministic_algorithms(False)
    site = Site(0, "attn_out")
    for twin in (other, ordered):
        assert torch.equal(one.splits["train"].sites[site], twin.splits["train"].sites[site])
        assert one.loss == twin.loss != third.loss
