from pathlib import Path

import pytest
import torch

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.dictionaries.base import Batch, Site
from tests.activations.harvests import LENGTH, run_harvest

VALUES = (Site(1, "v"), Site(2, "v"))


@pytest.fixture(scope="module")
def cache(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    return ActivationCache.open(run_harvest(tiny_model("llama"), tmp_path_factory.mktemp("batches")))


def contexts_of(cache: ActivationCache, batch: Batch) -> list[int]:
    """Which training contexts a batch holds."""
    tokens = cache.tokens("train", range(cache.n_contexts("train")))
    return [int((tokens == row).all(1).nonzero()) for row in batch.tokens]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[site], b[site]) for site in a.sites) and torch.equal(a.tokens, b.tokens)


def test_every_epoch_holds_every_context_once_in_another_order(cache: ActivationCache):
    batches = Batches(cache, "train", VALUES, contexts_per_batch=4, seed=0)
    seen = [context for step in range(5) for context in contexts_of(cache, batches.at(step))]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_a_batch_depends_on_seed_and_step_only(cache: ActivationCache):
    walked = Batches(cache, "train", VALUES, 4, seed=3)
    in_order = [walked.at(step) for step in range(6)]
    jumped = Batches(cache, "train", VALUES, 4, seed=3)
    assert all(same(jumped.at(step), in_order[step]) for step in (5, 2, 3, 3, 0))
    other = Batches(cache, "train", VALUES, 4, seed=4)
    assert not all(same(other.at(step), in_order[step]) for step in range(6))


def test_a_batch_holds_what_the_cache_holds(cache: ActivationCache):
    sites = [Site(1, "pattern"), Site(1, "attn_out")]
    batch = Batches(cache, "train", sites, 3, seed=1).at(2)
    assert same(batch, cache.read("train", contexts_of(cache, batch), sites))


def test_a_batch_may_be_larger_than_the_split(cache: ActivationCache):
    batch = Batches(cache, "train", VALUES, 25, seed=0).at(0)
    counts = torch.bincount(torch.tensor(contexts_of(cache, batch)))
    assert counts.sum() == 25
    assert counts.min() == 2


def test_all_goes_through_the_split_once_in_order(cache: ActivationCache):
    batches = Batches(cache, "train", VALUES, 4, seed=0)
    seen = [contexts_of(cache, batch) for batch in batches.all()]
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(batches) == 3


def test_a_sample_is_drawn_without_repetition_and_from_its_own_seed(cache: ActivationCache):
    batches = Batches(cache, "train", VALUES, 4, seed=0)
    sample = [context for batch in batches.sample(7, seed=5) for context in contexts_of(cache, batch)]
    assert len(set(sample)) == 7
    elsewhere = Batches(cache, "train", VALUES, 4, seed=9)
    assert all(same(a, b) for a, b in zip(batches.sample(7, seed=5), elsewhere.sample(7, seed=5), strict=True))
    assert sum(len(batch.tokens) for batch in batches.sample(100, seed=5)) == 10


@pytest.mark.parametrize("names", [("v",), ("v", "resid_in")])
def test_the_control_breaks_the_second_layer_and_nothing_else(names: tuple, cache: ActivationCache):
    sites = [Site(layer, name) for layer in (1, 2) for name in names]
    plain = Batches(cache, "train", sites, 4, seed=0).at(1)
    control = Batches(cache, "train", sites, 4, seed=0, control="other_contexts").at(1)
    here = contexts_of(cache, control)
    everything = cache.read("train", range(10), sites)
    assert torch.equal(plain.tokens, control.tokens)
    sources = []
    for name in names:
        first, second = Site(1, name), Site(2, name)
        assert torch.equal(plain[first], control[first])
        # Position 0 does not count and stays; every other row comes from a counted position of an absent context.
        moved, whole = ((x.movedim(-2, 1).flatten(2)) for x in (control[second], everything[second]))
        assert torch.equal(moved[:, 0], plain[second].movedim(-2, 1).flatten(2)[:, 0])
        found = [(whole == row).all(-1).nonzero() for row in moved[:, 1:].flatten(0, 1)]
        assert all(len(places) == 1 for places in found)
        places = torch.cat(found)
        assert not set(places[:, 0].tolist()) & set(here)
        assert places[:, 1].min() >= 1
        assert len(places.unique(dim=0)) == 4 * (LENGTH - 1)
        sources.append(places)
    assert all(torch.equal(sources[0], other) for other in sources), "sites of one layer move together"


def test_the_control_is_a_function_of_seed_and_step_and_covers_small_last_batches(cache: ActivationCache):
    a, b = (Batches(cache, "train", VALUES, 3, seed=2, control="other_contexts") for _ in range(2))
    assert same(a.at(4), b.at(4))
    last = list(a.all())[-1]
    plain = cache.read("train", [9], VALUES)
    assert last[VALUES[1]].shape == plain[VALUES[1]].shape
    assert not torch.equal(last[VALUES[1]], plain[VALUES[1]])


def test_bad_requests_are_refused(cache: ActivationCache):
    with pytest.raises(ValueError, match=r"no site 0\.v"):
        Batches(cache, "train", [Site(0, "v")], 4, seed=0)
    with pytest.raises(ValueError, match="contexts_per_batch=0"):
        Batches(cache, "train", VALUES, 0, seed=0)
    with pytest.raises(ValueError, match="at least two layers"):
        Batches(cache, "train", VALUES[:1], 4, seed=0, control="other_contexts")
    with pytest.raises(ValueError, match="more than contexts_per_batch=10 contexts, train has 10"):
        Batches(cache, "train", VALUES, 10, seed=0, control="other_contexts")


def test_the_control_refuses_sites_that_are_no_rows(tiny_model, tmp_path: Path):
    from tests.activations.harvests import make_config

    both = make_config(sites=[{"layer": layer, "names": ["q", "k", "v"]} for layer in (1, 2)])
    cache = ActivationCache.open(run_harvest(tiny_model("llama"), tmp_path, both))
    with pytest.raises(ValueError, match=r"moves single rows, which 2\.pattern does not survive"):
        Batches(cache, "train", [Site(1, "v"), Site(2, "pattern")], 3, seed=0, control="other_contexts")
