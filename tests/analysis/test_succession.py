from itertools import pairwise

import torch

from crosshead.analysis.succession import FAMILIES, queries_after_first_item, succession_texts
from crosshead.dictionaries.base import Batch
from tests.conftest import byte_tokenizer


def test_every_list_has_a_twin_of_the_same_items_in_which_none_follows_its_predecessor():
    found = succession_texts(windows=3, items=6, seed=0)
    assert len(found.ordered) == len(found.shuffled) == 3 * len(FAMILIES)
    for ordered, shuffled, family in zip(found.ordered, found.shuffled, found.families, strict=True):
        separator = ", " if "," in ordered else " "
        items, others = ordered.split(separator), shuffled.split(separator)
        assert sorted(items) == sorted(others)
        assert len(items) == 6
        names = FAMILIES[family]
        follows = {name: names[(i + 1) % len(names)] for i, name in enumerate(names)}
        assert all(follows[a] == b for a, b in pairwise(items))
        index = {item: i for i, item in enumerate(items)}
        assert all(index[b] != index[a] + 1 for a, b in pairwise(others))
    assert found == succession_texts(windows=3, items=6, seed=0)
    assert found.ordered != succession_texts(windows=3, items=6, seed=1).ordered


def test_queries_count_from_the_second_item_on():
    tokenizer = byte_tokenizer()
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[:, 0] = mask[1, 6:] = False
    batch = Batch({}, mask, torch.zeros(2, 8, dtype=torch.long))
    counted = queries_after_first_item(batch, ["one", "a"], tokenizer)
    assert counted.nonzero().tolist() == [[0, t] for t in range(4, 8)] + [[1, t] for t in range(2, 6)]
