from pathlib import Path

import pytest
import torch

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.activations.controls import sites_read
from crosshead.activations.matching import TokenMatches
from crosshead.dictionaries.base import Batch, Site
from tests.activations.harvests import LENGTH, make_config, make_corpus, run_harvest
from tests.activations.test_matching import brute_force

SITES = ({"layer": 1, "names": ["v", "resid_in"]}, {"layer": 2, "names": ["v", "resid_in", "v_shared_input"]})
VALUES = (Site(1, "v"), Site(2, "v"))
SHARED = Site(2, "v_shared_input")


@pytest.fixture(scope="module")
def cache(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> ActivationCache:
    """Few different tokens, so that many positions have a match and some have none."""
    model = tiny_model("llama")
    corpus = make_corpus(model, n_tokens=9)
    directory = run_harvest(model, tmp_path_factory.mktemp("controls"), make_config(sites=SITES), corpus)
    return ActivationCache.open(directory)


def contexts_of(cache: ActivationCache, batch: Batch) -> list[int]:
    tokens = cache.tokens("train", range(cache.n_contexts("train")))
    return [int((tokens == row).all(1).nonzero()) for row in batch.tokens]


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """[B, T, width] whatever the site."""
    return tensor.movedim(-2, 1).flatten(2)


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(a[site], b[site]) for site in a.sites) and torch.equal(a.tokens, b.tokens)


def test_matched_rows_are_rows_of_other_contexts_with_the_same_tokens(cache: ActivationCache):
    sites = [Site(layer, name) for layer in (1, 2) for name in ("v", "resid_in")]
    control = Batches(cache, "train", sites, 4, seed=0, control="matched_tokens").at(1)
    plain = Batches(cache, "train", sites, 4, seed=0).at(1)
    tokens, here = cache.tokens("train", range(10)), contexts_of(cache, control)
    everything = cache.read("train", range(10), sites)
    assert torch.equal(plain.tokens, control.tokens)
    assert torch.equal(plain.mask, control.mask)
    levels = set()
    for b, context in enumerate(here):
        for t in range(1, LENGTH):
            level, donors = brute_force(tokens, context, t)
            levels.add(level)
            of_site = []
            for name in ("v", "resid_in"):
                row = rows(control[Site(2, name)])[b, t]
                places = (rows(everything[Site(2, name)]) == row).all(-1).nonzero().tolist()
                of_site.append({(c, position) for c, position in places} & donors)
            # Equal beginnings of contexts have equal rows, so a row may stand at several places.
            assert of_site[0] & of_site[1], "a donor of the best level, the same for all sites of the layer"
    assert levels == {0, 1}
    for name in ("v", "resid_in"):
        assert torch.equal(plain[Site(1, name)], control[Site(1, name)])
        assert torch.equal(rows(plain[Site(2, name)])[:, 0], rows(control[Site(2, name)])[:, 0])
    unchanged = (rows(plain[Site(2, "v")]) == rows(control[Site(2, "v")])).all(-1)[:, 2:]
    assert unchanged.float().mean() < 0.05, "equal beginnings alone have equal rows"


def test_matched_rows_depend_on_seed_and_step_and_on_no_history(cache: ActivationCache):
    walked = Batches(cache, "train", VALUES, 3, seed=2, control="matched_tokens")
    in_order = [walked.at(step) for step in range(5)]
    jumped = Batches(cache, "train", VALUES, 3, seed=2, control="matched_tokens")
    assert all(same(jumped.at(step), in_order[step]) for step in (4, 1, 2, 2, 0))
    # The first and the fourth read of all() hold other contexts; a second pass over the split is the same.
    assert all(same(a, b) for a, b in zip(walked.all(), jumped.all(), strict=True))
    here, elsewhere = (Batches(cache, "train", VALUES, 10, seed=seed, control="matched_tokens") for seed in (2, 3))
    (a,), (b,), (c,) = here.all(), elsewhere.all(), here.all()
    assert same(a, c)
    assert torch.equal(a[VALUES[0]], b[VALUES[0]])
    assert not torch.equal(a[VALUES[1]], b[VALUES[1]])


def test_a_matched_batch_may_hold_the_whole_split_and_every_layer_draws_for_itself(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    sites = [{"layer": layer, "names": ["resid_in"]} for layer in (0, 1, 2)]
    corpus = make_corpus(model, n_tokens=4)
    cache = ActivationCache.open(run_harvest(model, tmp_path, make_config(sites=sites), corpus))
    layers = [Site(layer, "resid_in") for layer in (0, 1, 2)]
    (batch,) = Batches(cache, "heldout", layers, 8, seed=0, control="matched_tokens").all()
    everything = cache.read("heldout", range(5), layers)
    places = [(everything[site][None, None] == batch[site][:, 1:, None, None]).all(-1) for site in layers[1:]]
    assert all(place.flatten(2).any(-1).all() for place in places)
    assert not torch.equal(places[0], places[1])


def test_the_record_says_how_well_positions_were_matched(cache: ActivationCache):
    for split, n_contexts in (("train", 10), ("heldout", 5)):
        found = Batches(cache, split, VALUES, 4, seed=0, control="matched_tokens").control_detail
        assert found == TokenMatches(cache.tokens(split, range(n_contexts))).shares()
        assert sum(found.values()) == pytest.approx(1)
        assert 0 < found["pair"] < 1
    assert Batches(cache, "train", VALUES, 4, seed=0, control="shared_input").control_detail is None
    assert Batches(cache, "train", VALUES, 4, seed=0).control_detail is None


def test_shared_input_reads_the_other_values_under_the_name_of_values(cache: ActivationCache):
    plain = Batches(cache, "train", VALUES, 4, seed=0).at(2)
    control = Batches(cache, "train", VALUES, 4, seed=0, control="shared_input").at(2)
    assert tuple(control.sites) == VALUES
    assert torch.equal(control[VALUES[0]], plain[VALUES[0]])
    stored = cache.read("train", contexts_of(cache, control), [SHARED])[SHARED]
    assert torch.equal(control[VALUES[1]], stored)
    assert not torch.allclose(stored, plain[VALUES[1]], atol=1e-2)


def test_the_sites_a_run_reads_depend_on_its_control():
    assert sites_read(VALUES, "none", 1) == sites_read(VALUES, "matched_tokens", 1) == VALUES
    assert set(sites_read(VALUES, "shared_input", 1)) == {*VALUES, SHARED}
    assert sites_read(VALUES[:1], "shared_input", 1) == VALUES[:1]


def test_the_upper_layer_alone_can_read_the_shared_input(cache: ActivationCache):
    both = Batches(cache, "train", VALUES, 4, seed=0, control="shared_input").at(1)
    alone = Batches(cache, "train", VALUES[1:], 4, seed=0, control="shared_input").at(1)
    assert torch.equal(alone[VALUES[1]], both[VALUES[1]])


def test_controls_refuse_the_lowest_layer_alone(cache: ActivationCache):
    with pytest.raises(ValueError, match="control matched_tokens needs sites of at least two layers"):
        Batches(cache, "train", VALUES[:1], 4, seed=0, control="matched_tokens")
    with pytest.raises(ValueError, match="the run reads no values above it"):
        Batches(cache, "train", VALUES[:1], 4, seed=0, control="shared_input")


def test_shared_input_refuses_other_sites_and_values_that_were_not_made(
    cache: ActivationCache, tiny_model, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"knows values only, the run reads 2\.resid_in"):
        Batches(cache, "train", [VALUES[0], Site(2, "resid_in")], 4, seed=0, control="shared_input")
    sites = [{"layer": 0, "names": ["v"]}, *SITES]
    lower = ActivationCache.open(run_harvest(tiny_model("llama"), tmp_path, make_config(sites=sites)))
    with pytest.raises(ValueError, match=r"no site 1\.v_shared_input"):
        Batches(lower, "train", [Site(0, "v"), Site(1, "v")], 4, seed=0, control="shared_input")


def test_matched_tokens_refuses_patterns(tiny_model, tmp_path: Path):
    both = make_config(sites=[{"layer": layer, "names": ["q", "k", "v"]} for layer in (1, 2)])
    cache = ActivationCache.open(run_harvest(tiny_model("llama"), tmp_path, both))
    with pytest.raises(ValueError, match=r"matched_tokens moves single rows, which 2\.pattern does not survive"):
        Batches(cache, "train", [Site(1, "v"), Site(2, "pattern")], 3, seed=0, control="matched_tokens")
    lower = [Site(1, "pattern"), Site(2, "v")]
    batch = Batches(cache, "train", lower, 3, seed=0, control="matched_tokens").at(0)
    assert torch.equal(batch[lower[0]], Batches(cache, "train", lower, 3, seed=0).at(0)[lower[0]])
