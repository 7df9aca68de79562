import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from crosshead.activations.cache import ActivationCache
from crosshead.activations.corpus import Corpus
from crosshead.dictionaries.base import Site
from crosshead.io.files import sha256_file
from tests.activations.harvests import LENGTH, make_config, make_corpus, run_harvest


@pytest.fixture(scope="module")
def harvested(tiny_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_harvest(tiny_model("llama"), tmp_path_factory.mktemp("harvested"))


@pytest.fixture
def damaged(harvested: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(harvested, tmp_path / "cache"))


@pytest.fixture(scope="module")
def corpus(tiny_model) -> Corpus:
    return make_corpus(tiny_model("llama"))


def test_contexts_come_in_the_order_asked_for(harvested: Path, corpus: Corpus):
    cache = ActivationCache.open(harvested)
    everything = cache.read("train", range(10), cache.sites)
    some = cache.read("train", [9, 0, 4, 4, 3], cache.sites)
    assert torch.equal(some.tokens, corpus.tokens("train")[[9, 0, 4, 4, 3]])
    for site in cache.sites:
        assert torch.equal(some[site], everything[site][[9, 0, 4, 4, 3]])


def test_the_mask_leaves_out_the_first_token_only(harvested: Path):
    mask = ActivationCache.open(harvested).read("heldout", [0, 4], [Site(1, "v")]).mask
    assert mask.tolist() == [[False] + [True] * (LENGTH - 1)] * 2


def test_patterns_are_recomputed_without_q_and_k_in_the_batch(harvested: Path):
    batch = ActivationCache.open(harvested).read("train", [2], [Site(1, "pattern")])
    assert set(batch.sites) == {Site(1, "pattern")}
    torch.testing.assert_close(batch[Site(1, "pattern")].sum(-1), torch.ones(1, 4, LENGTH))
    assert not batch[Site(1, "pattern")].triu(1).any()


def test_single_rows_are_those_of_whole_contexts(harvested: Path):
    cache = ActivationCache.open(harvested)
    sites = [Site(2, "v"), Site(2, "resid_in"), Site(1, "q")]
    everything = cache.read("train", range(10), sites)
    contexts, positions = np.array([9, 0, 3, 4, 4, 9]), np.array([1, 0, LENGTH - 1, 5, 5, 2])
    found = cache.rows("train", contexts, positions, sites)
    assert [tuple(found[site].shape) for site in sites] == [(6, 2, 12), (6, 32), (6, 4, 12)]
    for site in sites:
        assert torch.equal(found[site], everything[site].movedim(-2, 1)[contexts, positions])
    assert cache.rows("heldout", np.zeros(0, int), np.zeros(0, int), sites[:1])[sites[0]].shape == (0, 2, 12)


def test_half_precision_rows_are_float32_as_contexts_are(tiny_model, tmp_path: Path):
    cache = ActivationCache.open(run_harvest(tiny_model("llama"), tmp_path, make_config(dtype="float16")))
    (row,) = cache.rows("train", np.array([7]), np.array([3]), [Site(2, "v")]).values()
    assert row.dtype == torch.float32
    assert torch.equal(row[0], cache.read("train", [7], [Site(2, "v")])[Site(2, "v")][0, :, 3])


@pytest.mark.parametrize(
    ("context", "position", "site", "message"),
    [(10, 1, "v", "context 10 is out of range; train has contexts 0 to 9"),
     (0, LENGTH, "v", f"position {LENGTH} is out of range; train has positions 0 to {LENGTH - 1}"),
     (0, -1, "v", "position -1 is out of range"),
     (0, 1, "mlp_in", r"no site 1\.mlp_in"),
     (0, 1, "pattern", r"site 1\.pattern is no row of a position")],
)  # fmt: skip
def test_rows_that_are_not_there_are_refused(harvested: Path, context: int, position: int, site: str, message: str):
    with pytest.raises(ValueError, match=message):
        ActivationCache.open(harvested).rows("train", np.array([context]), np.array([position]), [Site(1, site)])


def test_shards_are_mapped_and_not_copied(harvested: Path):
    before = pa.total_allocated_bytes()
    cache = ActivationCache.open(harvested)
    batch = cache.read("train", range(10), [Site(2, "v")])
    assert batch[Site(2, "v")].shape == (10, 2, LENGTH, 12)
    assert pa.total_allocated_bytes() == before


def test_reading_one_site_does_not_touch_the_others(damaged: Path):
    """Other columns are filled with nonsense behind the reader's back: the mapped pages show it, the site does not."""
    cache = ActivationCache.open(damaged)
    expected = cache.read("train", range(4), [Site(1, "v")])[Site(1, "v")]
    shard = damaged / "train-00000.arrow"
    before = bytearray(shard.read_bytes())
    residuals = cache.read("train", range(3), [Site(1, "resid_in")])[Site(1, "resid_in")].numpy().tobytes()
    place = before.find(residuals)
    assert place > 0, "a column of a record batch lies in one piece"
    with shard.open("r+b") as handle:
        handle.seek(place)
        handle.write(bytes(len(residuals)))
    assert torch.equal(cache.read("train", range(4), [Site(1, "v")])[Site(1, "v")], expected)
    assert not cache.read("train", range(3), [Site(1, "resid_in")])[Site(1, "resid_in")].any()


@pytest.mark.parametrize("keep", [0, 7, -1, -500])
def test_a_truncated_shard_is_refused(keep: int, damaged: Path):
    shard = damaged / "train-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"train-00001\.arrow is damaged.*run the harvest stage again"):
        ActivationCache.open(damaged)


def test_a_truncated_shard_is_refused_even_where_the_manifest_believes_it(damaged: Path):
    shard = damaged / "train-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-8])
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["shards"]["train"][1]["bytes"] -= 8
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"train-00001\.arrow is damaged"):
        ActivationCache.open(damaged)


def test_a_missing_shard_is_refused(damaged: Path):
    (damaged / "heldout-00000.arrow").unlink()
    with pytest.raises(ValueError, match=r"heldout-00000\.arrow is missing"):
        ActivationCache.open(damaged)


def test_a_flipped_bit_is_found_when_hashes_are_checked(damaged: Path):
    shard = damaged / "train-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    ActivationCache.open(damaged)
    with pytest.raises(ValueError, match=r"train-00000\.arrow is damaged: its sha256 is"):
        ActivationCache.open(damaged, verify="sha256")


def test_shards_of_equal_size_that_changed_places_are_found_when_hashes_are_checked(damaged: Path):
    first, second = damaged / "train-00000.arrow", damaged / "train-00001.arrow"
    assert first.stat().st_size == second.stat().st_size
    first.rename(damaged / "aside")
    second.rename(first)
    (damaged / "aside").rename(second)
    with pytest.raises(ValueError, match=r"train-00000\.arrow is damaged: its sha256 is"):
        ActivationCache.open(damaged, verify="sha256")


def test_a_file_found_intact_is_hashed_again_only_when_it_changed(damaged: Path, tmp_path: Path, monkeypatch):
    note, hashed = tmp_path / "verified.json", []

    def counting(path):
        hashed.append(Path(path).name)
        return sha256_file(path)

    monkeypatch.setattr("crosshead.activations.cache.sha256_file", counting)
    shards = sorted(path.name for path in damaged.glob("*.arrow"))
    ActivationCache.open(damaged, verify="sha256", remember=note)
    assert sorted(set(hashed) - {"weights.safetensors"}) == shards
    hashed.clear()
    ActivationCache.open(damaged, verify="sha256", remember=note)
    assert hashed == ["weights.safetensors"]
    changed = damaged / "train-00001.arrow"
    data = bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00001\.arrow is damaged: its sha256 is"):
        ActivationCache.open(damaged, verify="sha256", remember=note)
    note.write_text("{")
    changed.unlink()
    with pytest.raises(ValueError, match=r"train-00001\.arrow is missing"):
        ActivationCache.open(damaged, verify="sha256", remember=note)


def test_a_shard_of_another_number_of_contexts_is_refused(damaged: Path):
    manifest = json.loads((damaged / "manifest.json").read_text())
    shard = manifest["shards"]["train"][0]
    shard["contexts"] = 3
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"holds 4 contexts .* the manifest says 3"):
        ActivationCache.open(damaged)


def test_damaged_weights_are_always_found(damaged: Path):
    weights = damaged / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"weights\.safetensors is damaged"):
        ActivationCache.open(damaged)
    weights.unlink()
    with pytest.raises(ValueError, match=r"weights\.safetensors is missing"):
        ActivationCache.open(damaged)


def test_a_damaged_or_missing_manifest_is_refused(damaged: Path):
    manifest = json.loads((damaged / "manifest.json").read_text())
    del manifest["columns"]
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"is not a cache manifest \(columns: Field required\)"):
        ActivationCache.open(damaged)
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ActivationCache.open(damaged)
    (damaged / "manifest.json").unlink()
    with pytest.raises(ValueError, match="does not exist; run the stage"):
        ActivationCache.open(damaged)


def test_a_cache_of_another_model_or_corpus_is_refused(harvested: Path, corpus: Corpus):
    ActivationCache.open(harvested, corpus=corpus.fingerprint)
    with pytest.raises(ValueError, match="made with another model"):
        ActivationCache.open(harvested, model="0123456789abcdef")
    with pytest.raises(ValueError, match="made with another corpus"):
        ActivationCache.open(harvested, corpus="0123456789abcdef")


def test_what_the_cache_has_not_is_named(harvested: Path):
    cache = ActivationCache.open(harvested)
    with pytest.raises(ValueError, match=r"no site 2\.k, 2\.q; it holds 1\.attn_out"):
        cache.read("train", [0], [Site(2, "pattern")])
    with pytest.raises(ValueError, match="context 10 is out of range; train has contexts 0 to 9"):
        cache.read("train", [10], [Site(1, "v")])
    with pytest.raises(ValueError, match="no split 'test'; it has heldout, train"):
        cache.read("test", [0], [Site(1, "v")])
    with pytest.raises(ValueError, match="knows layers 1, 2, got 0"):
        cache.rotary(0)
