import errno
import gc
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from crosshead.activations.base_model import LanguageModel, load_model
from crosshead.activations.cache import ActivationCache
from crosshead.activations.capture import capture, layer_weights, rotary_tables
from crosshead.activations.harvest import HarvestConfig, harvest, harvest_fingerprint
from crosshead.dictionaries.base import Site
from tests.activations.harvests import LAYERS, LENGTH, file_bytes, make_config, make_corpus, run_harvest


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_cache_holds_what_capture_sees(family: str, tiny_model, tmp_path: Path):
    model = tiny_model(family)
    corpus = make_corpus(model)
    cache = ActivationCache.open(run_harvest(model, tmp_path), verify="sha256", model=model.fingerprint,
                                 corpus=corpus.fingerprint)  # fmt: skip
    sites = [*cache.sites, Site(1, "pattern")]
    for split, n_contexts in (("train", 10), ("heldout", 5)):
        assert cache.n_contexts(split) == n_contexts
        tokens = corpus.tokens(split)
        batch = cache.read(split, range(n_contexts), sites)
        assert torch.equal(batch.tokens, tokens)
        for site, expected in capture(model, tokens, sites).items():
            torch.testing.assert_close(batch[site], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert cache.domains(split) == corpus.domains(split)


def test_weights_and_rotary_tables_lie_beside_the_shards(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    cache = ActivationCache.open(run_harvest(model, tmp_path))
    assert set(cache.weights()) == set(cache.specs) == {1, 2}
    assert torch.equal(cache.weights()[2].W_O, layer_weights(model, 2).W_O)
    for got, expected in zip(cache.rotary(1), rotary_tables(model, 1, LENGTH), strict=True):
        assert torch.equal(got, expected)


def test_a_model_without_rotation_has_no_tables(tiny_model, tmp_path: Path):
    assert ActivationCache.open(run_harvest(tiny_model("gpt2"), tmp_path)).rotary(1) is None


def test_the_manifest_tells_schema_files_and_origins(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    directory = run_harvest(model, tmp_path, make_config(dtype="float16"))
    manifest = json.loads((directory / "manifest.json").read_text())
    assert [shard["contexts"] for shard in manifest["shards"]["train"]] == [4, 4, 2]
    assert [shard["file"] for shard in manifest["shards"]["heldout"]] == ["heldout-00000.arrow", "heldout-00001.arrow"]
    dtypes = {f"{column['layer']}.{column['name']}": column["dtype"] for column in manifest["columns"]}
    assert dtypes == {"1.q": "float32", "1.k": "float32", "1.v": "float16", "1.resid_in": "float16",
                      "1.attn_out": "float16", "2.v": "float16", "2.resid_in": "float16"}  # fmt: skip
    assert (manifest["model"], manifest["corpus"]) == (model.fingerprint, make_corpus(model).fingerprint)
    listed = {shard["file"] for shards in manifest["shards"].values() for shard in shards}
    assert {path.name for path in directory.iterdir()} == listed | {"manifest.json", "weights.safetensors"}


def test_float16_halves_the_file_and_keeps_three_digits(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    whole = ActivationCache.open(run_harvest(model, tmp_path / "whole")).read("train", [0, 7], [Site(1, "resid_in")])
    half = ActivationCache.open(run_harvest(model, tmp_path / "half", make_config(dtype="float16")))
    torch.testing.assert_close(half.read("train", [0, 7], [Site(1, "resid_in")])[Site(1, "resid_in")],
                               whole[Site(1, "resid_in")], rtol=1e-3, atol=1e-3)  # fmt: skip


def _some_token(model: LanguageModel) -> int:
    """A token of the corpus, not among the first few that the anatomy is found with."""
    return int(make_corpus(model).tokens("train").max())


def test_float16_is_refused_where_an_activation_does_not_fit(tiny_model_directory, tmp_path: Path):
    model = load_model(tiny_model_directory("llama"))
    model.model.get_input_embeddings().weight[_some_token(model)] = 1e5
    with pytest.raises(ValueError, match=r"site 1\.resid_in reaches 1.*float16 holds at most 65504"):
        run_harvest(model, tmp_path, make_config(dtype="float16"))
    assert not (tmp_path / "cache").exists()


def test_activations_that_are_not_finite_are_refused(tiny_model_directory, tmp_path: Path):
    model = load_model(tiny_model_directory("llama"))
    model.model.get_input_embeddings().weight[_some_token(model)] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        run_harvest(model, tmp_path)


def test_two_harvests_are_byte_identical(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    first, second = (file_bytes(run_harvest(model, tmp_path / name)) for name in ("a", "b"))
    assert first == second


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [0, 3, 4, 7, 13])
def test_an_interrupted_harvest_goes_on_and_ends_byte_identical(stop_at: int, tiny_model, tmp_path: Path):
    model = tiny_model("llama")

    def stop(done: int, total: int) -> None:
        if done >= stop_at:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_harvest(model, tmp_path / "killed", progress=stop)
    assert not (tmp_path / "killed" / "cache").exists()
    kept = sorted((tmp_path / "killed" / "work").glob("*/cache/*.arrow"))
    assert len(kept) == {0: 0, 3: 0, 4: 1, 7: 1, 13: 3}[stop_at]
    written = {path.name: path.stat().st_mtime_ns for path in kept}
    resumed = run_harvest(model, tmp_path / "killed")
    assert file_bytes(resumed) == file_bytes(run_harvest(model, tmp_path / "whole"))
    assert all((resumed / name).stat().st_mtime_ns == time for name, time in written.items())
    assert not list((tmp_path / "killed" / "work").iterdir())


def _harvest_and_die(model_directory: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)

    def die(done: int, total: int) -> None:
        if done == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    run_harvest(load_model(model_directory), tmp_path, progress=die)


def test_a_harvest_killed_inside_a_shard_resumes_byte_identical(tiny_model_directory, tmp_path: Path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        directory = tiny_model_directory("gpt2")
        process = multiprocessing.get_context("spawn").Process(target=_harvest_and_die,
                                                               args=(directory, tmp_path / "killed"))  # fmt: skip
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        names = {path.name for path in (tmp_path / "killed" / "work").glob("*/cache/*")}
        assert "train-00000.arrow" in names
        assert any(name.startswith(".train-00001.arrow") for name in names), "killed while a shard was under way"
        model = load_model(directory)
        resumed = file_bytes(run_harvest(model, tmp_path / "killed"))
        assert resumed == file_bytes(run_harvest(model, tmp_path / "whole"))
    finally:
        torch.set_num_threads(threads)


def test_a_full_disk_is_one_clear_error_and_leaves_nothing_half_written(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    earlier = file_bytes(run_harvest(model, tmp_path, make_config(shard_contexts=5)))
    config, corpus = make_config(), make_corpus(model)
    state = tmp_path / "work" / harvest_fingerprint(model, corpus, config, config.resolve(LAYERS))

    def fill(done: int, total: int) -> None:
        # What the second shard writes to its temporary name lands on a device that is always full.
        if done == 4 and not list(state.glob("cache/.*.tmp")):
            (state / "cache" / f".train-00001.arrow.{os.getpid()}.tmp").symlink_to("/dev/full")

    with pytest.raises(OSError, match=r"disk is full while writing the cache; free some space .*/work/") as caught:
        run_harvest(model, tmp_path, config, progress=fill)
    assert caught.value.errno == errno.ENOSPC
    assert file_bytes(tmp_path / "cache") == earlier
    assert [path.name for path in (state / "cache").iterdir()] == ["train-00000.arrow"]
    assert file_bytes(run_harvest(model, tmp_path, config)) != earlier


def test_a_disk_that_fills_up_under_the_weights_is_told_the_same_way(tiny_model, tmp_path: Path, monkeypatch):
    def fills_the_disk(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fills_the_disk)
    with pytest.raises(OSError, match="disk is full while writing the cache"):
        run_harvest(tiny_model("llama"), tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "cache").exists()
    run_harvest(tiny_model("llama"), tmp_path)


def test_a_harvest_that_cannot_fit_is_refused_before_it_starts(tiny_model, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ValueError, match=r"GB more under .* are free; free some space"):
        run_harvest(tiny_model("llama"), tmp_path)


def test_other_operating_system_errors_keep_their_own_words(tiny_model, tmp_path: Path):
    def fail(done: int, total: int) -> None:
        raise OSError(errno.EIO, "broken device")

    with pytest.raises(OSError, match="broken device"):
        run_harvest(tiny_model("llama"), tmp_path, progress=fail)


def test_two_processes_do_not_share_a_harvest(tiny_model, tmp_path: Path):
    model = tiny_model("llama")

    def start_another(done: int, total: int) -> None:
        run_harvest(model, tmp_path)

    with pytest.raises(ValueError, match="another process is at work on this harvest"):
        run_harvest(model, tmp_path, progress=start_another)


def _largest_bytes_alive(model: LanguageModel, tmp_path: Path, n_contexts: int) -> int:
    """Most bytes of tensors with a context axis alive at any forward pass."""
    sizes: list[int] = []

    def measure(done: int, total: int) -> None:
        tensors = [item for item in gc.get_objects() if type(item) is torch.Tensor and item.ndim >= 3]
        sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors if LENGTH in tensor.shape))

    run_harvest(model, tmp_path, corpus=make_corpus(model, train=n_contexts), progress=measure)
    return max(sizes)


def test_memory_does_not_grow_with_the_corpus(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    few, many = (_largest_bytes_alive(model, tmp_path / str(n), n) for n in (12, 96))
    assert many <= few


def test_progress_counts_every_context_once(tiny_model, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    run_harvest(tiny_model("llama"), tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 15)
    assert seen[-1] == (15, 15)
    assert seen == sorted(seen)


def test_a_bad_request_is_refused_before_anything_is_written(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    for changes, message in (
        ({"sites": [{"layer": 3, "names": ["v"]}]}, "layer 3 is out of range; .*; correct harvest.sites"),
        (
            {"sites": [{"layer": "adjacent", "names": ["v"]}]},
            "names the layer 'adjacent', the survey chose first, second",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            run_harvest(model, tmp_path, make_config(**changes))
    with pytest.raises(ValueError, match="no heldout contexts"):
        run_harvest(model, tmp_path, corpus=make_corpus(model, heldout=0))
    with pytest.raises(ValueError, match="contexts of 200 tokens exceed the model's limit of 128"):
        run_harvest(model, tmp_path, corpus=make_corpus(model, length=200))
    corpus = make_corpus(model)
    corpus.manifest["vocabulary"] = "another"
    with pytest.raises(ValueError, match="another tokenizer"):
        run_harvest(model, tmp_path, corpus=corpus)
    assert not (tmp_path / "cache").exists()


def test_patterns_and_misspelt_sites_are_no_valid_configuration():
    for name in ("pattern", "residual"):
        with pytest.raises(ValueError, match="names"):
            HarvestConfig.model_validate({"sites": [{"layer": 1, "names": [name]}]})


def test_entries_that_name_the_same_layer_are_joined():
    config = HarvestConfig.model_validate({"sites": [{"layer": "first", "names": ["v"]},
                                                     {"layer": 1, "names": ["q", "v"]}]})  # fmt: skip
    assert config.resolve({"first": 1}) == (Site(1, "q"), Site(1, "v"))


def test_the_fingerprint_changes_with_everything_that_decides_the_bytes(tiny_model):
    model, other = tiny_model("llama"), tiny_model("llama", 1)
    corpus, config = make_corpus(model), make_config()
    sites = config.resolve(LAYERS)
    same = harvest_fingerprint(model, corpus, config, sites)
    assert same == harvest_fingerprint(model, make_corpus(model), make_config(), sites)
    others = {
        harvest_fingerprint(other, corpus, config, sites),
        harvest_fingerprint(model, make_corpus(model, seed=1), config, sites),
        harvest_fingerprint(model, corpus, make_config(batch_contexts=2), sites),
        harvest_fingerprint(model, corpus, make_config(dtype="float16"), sites),
        harvest_fingerprint(model, corpus, config, sites[1:]),
    }
    assert len(others | {same}) == 6


def test_harvest_replaces_an_earlier_cache(tiny_model, tmp_path: Path):
    model = tiny_model("llama")
    run_harvest(model, tmp_path, make_config(shard_contexts=2))
    again = run_harvest(model, tmp_path)
    assert file_bytes(again) == file_bytes(run_harvest(model, tmp_path / "fresh"))
    harvest(model, make_corpus(model), make_config(), LAYERS, again, work=tmp_path / "work")
