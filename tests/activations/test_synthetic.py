from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.activations.synthetic import SyntheticSplit, write_cache
from crosshead.dictionaries.base import LayerWeights, ModelDims, Site
from crosshead.maths.patterns import AttentionSpec, attention_patterns
from tests.activations.harvests import file_bytes
from tests.conftest import make_random_batch

DIMS = ModelDims(d_model=6, n_heads=4, n_kv_heads=2, head_dim=5, n_layers=3)
SPEC = AttentionSpec(n_heads=4, n_kv_heads=2, head_dim=5, scale=0.3)
SITES = tuple(Site(1, name) for name in ("attn_out", "k", "q", "resid_in", "v"))
DESCRIPTION = {"by": "test"}


def arrays(n_contexts: int, seed: int) -> SyntheticSplit:
    batch = make_random_batch(SITES, DIMS, n_contexts, 7, seed)
    return SyntheticSplit(batch.tokens, ["made"] * n_contexts, batch.sites)


def splits() -> dict[str, SyntheticSplit]:
    return {"train": arrays(10, 0), "heldout": arrays(3, 1)}


def weights() -> dict[int, LayerWeights]:
    generator = torch.Generator().manual_seed(2)
    return {1: LayerWeights(torch.randn(4, 5, 6, generator=generator), torch.randn(6, generator=generator))}


def write(directory: Path, **changes: Any) -> ActivationCache:
    given: dict[str, Any] = {"splits": splits(), "dims": DIMS, "weights": weights(), "specs": {1: SPEC}}
    given |= {"description": DESCRIPTION, "shard_contexts": 4} | changes
    write_cache(directory, given.pop("splits"), **given)
    return ActivationCache.open(directory, verify="sha256")


def test_a_cache_gives_back_the_arrays_it_was_written_from(tmp_path):
    cache = write(tmp_path / "cache")
    assert cache.dims == DIMS
    assert cache.specs == {1: SPEC}
    assert cache.domains("heldout") == ["made"] * 3
    for name, split in splits().items():
        found = cache.read(name, range(len(split.tokens)), SITES)
        assert torch.equal(found.tokens, split.tokens)
        assert all(torch.equal(found[site], split.sites[site]) for site in SITES)
    for ours, theirs in zip(cache.weights()[1], weights()[1], strict=True):
        assert torch.equal(ours, theirs)


def test_patterns_are_those_of_q_and_k_and_batches_read_as_from_a_harvest(tmp_path):
    cache = write(tmp_path / "cache")
    train = splits()["train"]
    pattern = attention_patterns(train.sites[Site(1, "q")], train.sites[Site(1, "k")], SPEC)
    batch = Batches(cache, "train", (Site(1, "pattern"), Site(1, "v")), 3, seed=0).at(1)
    for row, (tokens, found) in enumerate(zip(batch.tokens, batch[Site(1, "pattern")], strict=True)):
        context = int((train.tokens == tokens).all(1).nonzero())
        assert_close(found, pattern[context])
        assert torch.equal(batch[Site(1, "v")][row], train.sites[Site(1, "v")][context])


def test_the_same_arrays_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


def broken(split: SyntheticSplit, site: Site, tensor: torch.Tensor) -> SyntheticSplit:
    return split._replace(sites={**split.sites, site: tensor})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": {}}, "no split to write"),
        ({"splits": {"train": arrays(4, 0)._replace(domains=["a"])}}, "4, 7.*and 1 domains"),
        ({"splits": {"train": broken(arrays(4, 0), SITES[4], torch.zeros(4, 4, 7, 5))}},
         r"site 1\.v: shape \(4, 4, 7, 5\), expected \(4, 2, 7, 5\)"),
        ({"splits": {"train": broken(arrays(4, 0), SITES[0], torch.full((4, 7, 6), torch.nan))}}, "not finite"),
        ({"splits": {"train": broken(arrays(4, 0), Site(1, "pattern"), torch.zeros(4, 4, 7, 7))}}, "recomputed"),
        ({"splits": splits() | {"heldout": arrays(3, 1)._replace(sites={})}}, "split heldout holds"),
        ({"weights": {}}, "layer 1 lacks its output map"),
        ({"specs": {1: SPEC.model_copy(update={"rotary": "rotary.1"})}}, "rotary tables 'rotary.1'"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused_and_nothing_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "cache", **changes)
    assert list(tmp_path.iterdir()) == []
