import pytest
import torch
from torch.testing import assert_close

from crosshead import Site, read_texts


def test_padding_changes_nothing_that_counts(tiny_model):
    model = tiny_model("llama")
    sites = (Site(1, "resid_in"), Site(1, "pattern"))
    both = read_texts(model, ["attention", "moves information"], sites)
    alone = read_texts(model, ["attention"], sites)
    length = alone.mask.shape[1]
    assert both.mask[0].tolist() == [False] + [True] * (length - 1) + [False] * (both.mask.shape[1] - length)
    for site in sites:
        shorter = both[site][:1, ..., :length, :length] if site.name == "pattern" else both[site][:1, :length]
        assert_close(shorter, alone[site], rtol=1e-4, atol=1e-5)


def test_every_context_begins_with_the_beginning_of_text_token_and_is_cut(tiny_model):
    batch = read_texts(tiny_model("llama"), ["a long text" * 10], [Site(0, "v")], context_length=7)
    assert batch.tokens.shape == (1, 7)
    assert batch.tokens[0, 0] == tiny_model("llama").bos_id
    assert not torch.any(batch.mask[:, 0])


def test_empty_texts_are_refused(tiny_model):
    with pytest.raises(ValueError, match="no texts given"):
        read_texts(tiny_model("llama"), [], [])
    with pytest.raises(ValueError, match=r"text 1 \(''\) has no tokens"):
        read_texts(tiny_model("llama"), ["a", ""], [])
