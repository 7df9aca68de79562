import pytest
import torch

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache, read_manifest
from crosshead.activations.live import LiveActivations
from crosshead.dictionaries import mtc
from crosshead.dictionaries.base import Site
from crosshead.dictionaries.registry import build
from crosshead.dictionaries.sparsity import L1
from crosshead.training.fit import TrainingConfig, fit
from tests.activations.harvests import make_config, make_corpus, run_harvest

SITES = (Site(1, "pattern"), Site(1, "resid_in"), Site(1, "attn_out"), Site(2, "v"))


@pytest.fixture
def both(tiny_model, tmp_path):
    """The same harvest as a cache and as a stream."""
    model = tiny_model("llama")
    cache = ActivationCache.open(run_harvest(model, tmp_path / "cached"))
    streamed = run_harvest(model, tmp_path / "streamed", make_config(mode="stream"))
    return cache, LiveActivations(streamed, model, make_corpus(model))


def test_a_stream_leaves_no_shard_and_opens_as_one(both):
    cache, live = both
    assert not list(live.directory.glob("*.arrow"))
    assert read_manifest(live.directory).shards == {}
    assert live.sites == cache.sites
    assert live.specs == cache.specs
    assert torch.equal(live.weights()[2].W_O, cache.weights()[2].W_O)


def test_the_same_batches_in_the_same_order_as_from_the_cache(both):
    sources = [Batches(source, "train", SITES, 3, seed=5) for source in both]
    for step in (0, 1, 2, 7, 3):
        cached, live = (batches.at(step) for batches in sources)
        assert torch.equal(cached.tokens, live.tokens)
        assert torch.equal(cached.mask, live.mask)
        for site in SITES:
            torch.testing.assert_close(live[site], cached[site], rtol=1e-4, atol=1e-5)
    for cached, live in zip(*(batches.all() for batches in sources), strict=True):
        assert torch.equal(cached.tokens, live.tokens)
    assert both[0].domains("heldout") == both[1].domains("heldout")


def test_a_control_moves_the_same_rows(both):
    sites = (Site(1, "v"), Site(2, "v"))
    cache = ActivationCache.open(both[0].directory)
    with pytest.raises(ValueError, match=r"no site 1\.mlp_in"):
        both[1].read("train", [0], [Site(1, "mlp_in")])
    a, b = (Batches(source, "train", sites, 2, seed=1, control="other_contexts").at(4) for source in (cache, both[1]))
    for site in sites:
        torch.testing.assert_close(a[site], b[site], rtol=1e-4, atol=1e-5)


def test_a_stream_of_another_corpus_or_split_is_refused(both, tiny_model):
    live = both[1]
    with pytest.raises(ValueError, match="made with another corpus"):
        LiveActivations(live.directory, tiny_model("llama"), make_corpus(tiny_model("llama"), seed=1))
    with pytest.raises(ValueError, match="no split 'test'"):
        live.read("test", [0], [Site(1, "v")])
    with pytest.raises(ValueError, match="context 10 is out of range"):
        live.read("train", [10], [Site(1, "v")])


def test_single_rows_are_refused_with_the_way_out(both):
    with pytest.raises(ValueError, match=r"harvest that only streams.*harvest\.mode: cache"):
        Batches(both[1], "train", [Site(1, "v"), Site(2, "v")], 2, seed=1, control="matched_tokens")


def test_values_of_a_shared_input_come_from_the_harvests_lowest_layer_whatever_is_asked_for(tiny_model, tmp_path):
    model, site = tiny_model("llama"), Site(2, "v_shared_input")
    sites = ({"layer": 1, "names": ["v"]}, {"layer": 2, "names": ["v", "v_shared_input"]})
    cache = ActivationCache.open(run_harvest(model, tmp_path / "cached", make_config(sites=sites)))
    streamed = run_harvest(model, tmp_path / "streamed", make_config(sites=sites, mode="stream"))
    live = LiveActivations(streamed, model, make_corpus(model))
    a, b = (source.read("heldout", [0, 3], [site])[site] for source in (cache, live))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_training_from_a_stream_ends_where_one_from_the_cache_does(both, tmp_path):
    config = mtc.Config(layers=(1,), features=24, sparsity=L1(coefficient=0.5))
    schedule = TrainingConfig(steps=6, contexts_per_batch=2, warmup_steps=2, start_contexts=2, calibrate_contexts=2,
                              evaluate_every=6, checkpoint_every=6)  # fmt: skip
    trained = []
    for i, source in enumerate(both):
        module = build(config, source.dims)
        train = Batches(source, "train", (*module.sites, *module.start_sites), 2, seed=0)
        heldout = Batches(source, "heldout", module.sites, 2, seed=0)
        fit(module, train, heldout, source.weights(), schedule, seed=0, work=tmp_path / str(i), identity="a")
        trained.append(module.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], rtol=1e-2, atol=1e-3, msg=name)
