"""What is measured as a whole: harvest, fit, clustering, the smoke profile. One process, our environment."""

import ctypes
import dataclasses
import gc
import itertools
import os
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from benchmarks.worker import status
from crosshead.activations.base_model import LanguageModel, load_model
from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.activations.capture import capture
from crosshead.activations.corpus import Corpus
from crosshead.activations.harvest import HarvestConfig, LayerSites, harvest
from crosshead.activations.machine import Machine
from crosshead.analysis.clustering import ClusterConfig, analyse_loadings, cluster_labels
from crosshead.dictionaries.base import Site
from crosshead.dictionaries.registry import build, config_class
from crosshead.io.files import read_json
from crosshead.training.fit import TrainingConfig, fit

__all__ = ["whole_rows"]

CONTEXTS = 4
_HARVESTED = 32
_FITS = (("mtc", 2048, 60, 3), ("mtc", 8192, 60, 3), ("attn_out_sae", 8192, 60, 3), ("mtc", 32768, 30, 1),
         ("mtc", 100_000, 15, 1))  # fmt: skip
"""Architecture, features, steps, how often."""
_KMEANS = "k-means, 256 clusters in 20 dimensions"
_CLUSTERING = "clustering stage of one dictionary and its nulls, 20 heads"


class _Clocked:
    """Batches that note when they were asked for and how long that took."""

    def __init__(self, batches: Batches):
        self.batches, self.asked, self.waited = batches, [], []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)

    def at(self, step: int) -> Any:
        """The batch of a step."""
        self.asked.append(time.perf_counter())
        batch = self.batches.at(step)
        self.waited.append(time.perf_counter() - self.asked[-1])
        return batch


def whole_rows(root: Path, data: Path, pairs: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Rows in the form of latest.json, of the works that the pattern ``only`` is found in."""
    works: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "harvest, forward passes": lambda: _harvest(data, pairs),
        "harvest, whole": lambda: _whole_harvest(data, min(pairs, 3)),
        **{f"fit, {plan[0]} F={plan[1]}": partial(_fit, data, *plan) for plan in _FITS},
        _KMEANS: lambda: _kmeans(min(pairs, 3)),
        _CLUSTERING: _clustering,
        "smoke profile": lambda: _smoke(root),
    }
    Machine(device="cpu", threads=torch.get_num_threads()).prepare()
    for name, measured in works.items():
        if re.search(only, name):
            try:
                yield from measured()
            except Exception as error:  # the other works go on
                yield {"work": name, "implementation": "ours", "shape": {}, "error": f"{type(error).__name__}: {error}"}


def _harvest(data: Path, pairs: int) -> Iterator[dict[str, Any]]:
    """Capturing the laptop profile's sites beside the bare forward pass, and beside transformers' own outputs."""
    model, corpus = load_model(data / "model", device="cpu"), Corpus.load(data / "corpus")
    layers = read_json(data / "survey" / "layers.json")
    first, second = layers["first"], layers["second"]
    sites = [Site(first, name) for name in ("resid_in", "q", "k", "v", "attn_out", "resid_out")]  # pyright: ignore
    sites.append(Site(second, "v"))
    ways: dict[str, Callable[[torch.Tensor], Any]] = {
        "ours/capture": lambda tokens: capture(model, tokens, sites),
        "transformers/truncated forward": lambda tokens: _bare(model, tokens, second),
        "transformers/hidden states and attentions": lambda tokens: _hidden_states(model, tokens, second),
    }
    shape = {"N": CONTEXTS * corpus.context_length, "T": corpus.context_length, "d": model.dims.d_model}
    batches = [corpus.tokens("train", slice(i, i + CONTEXTS)) for i in range(0, CONTEXTS * (pairs + 1), CONTEXTS)]
    yield from _by_turns("harvest, forward passes", shape, ways, batches)


def _whole_harvest(data: Path, pairs: int) -> Iterator[dict[str, Any]]:
    """Everything the harvest stage does for some contexts, shards and manifest included, beside the forward pass.

    Opening and closing count here once for 64 contexts, in the stage once for all.
    """
    model, corpus = load_model(data / "model", device="cpu"), _first_contexts(Corpus.load(data / "corpus"))
    layers = read_json(data / "survey" / "layers.json")
    config = HarvestConfig(
        sites=(LayerSites(layer="first", names=("resid_in", "q", "k", "v", "attn_out", "resid_out")),
               LayerSites(layer="second", names=("v",))),
        batch_contexts=CONTEXTS,
    )  # fmt: skip

    def ours(directory: Path) -> None:
        harvest(model, corpus, config, layers, directory / "cache", work=directory)

    def bare(_: Path) -> None:
        for split in ("train", "heldout"):
            for start in range(0, _HARVESTED, CONTEXTS):
                _bare(model, corpus.tokens(split, slice(start, start + CONTEXTS)), layers["second"])

    shape = {"N": 2 * _HARVESTED * corpus.context_length, "T": corpus.context_length, "d": model.dims.d_model}
    with tempfile.TemporaryDirectory() as directory:
        folders = [Path(directory) / str(i) for i in range(pairs + 1)]
        yield from _by_turns("harvest, whole", shape, {"ours/harvest": ours, "transformers/truncated forward": bare},
                             folders)  # fmt: skip


def _first_contexts(corpus: Corpus) -> Corpus:
    """As many contexts called training ones as held-out ones."""
    few = corpus.manifest | {"n_contexts": {"train": _HARVESTED, "heldout": _HARVESTED}}
    return dataclasses.replace(corpus, manifest=few, _table=corpus._table.slice(0, 2 * _HARVESTED))


def _by_turns(
    work: str, shape: dict[str, int], ways: dict[str, Callable[[Any], Any]], inputs: list[Any]
) -> Iterator[dict[str, Any]]:
    """Time every way on every input, one after the other; the first input warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for given in inputs:
        for name, way in ways.items():
            start = time.perf_counter()
            way(given)
            seconds[name].append(time.perf_counter() - start)
    ours = seconds[next(iter(ways))][1:]
    for name, own in seconds.items():
        yield {"work": work, "implementation": name, "shape": shape, "seconds_median": statistics.median(own[1:]),
               "peak_bytes": None, "ratio_to_encoder_product": None,
               "ratio_to_ours": statistics.median(a / b for a, b in zip(own[1:], ours, strict=True)),
               "pairs": len(ours)}  # fmt: skip


class _Reached(Exception):  # noqa: N818 - a signal
    pass


@torch.no_grad()
def _bare(model: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    """The same forward pass as ours, to the values of ``layer``, with nothing kept."""

    def stop(*_: Any) -> None:
        raise _Reached

    attention = model.model.get_submodule(f"model.layers.{layer}.self_attn.v_proj")
    hook = attention.register_forward_hook(stop)
    try:
        model.model(tokens, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()


@torch.no_grad()
def _hidden_states(model: LanguageModel, tokens: torch.Tensor, layer: int) -> None:
    """What transformers offers for it: all hidden states and patterns of a model cut after ``layer``."""
    inner: Any = model.model.get_submodule("model")
    layers, implementation = inner.layers, model.model.config._attn_implementation
    inner.layers = layers[: layer + 1]
    model.model.config._attn_implementation = "eager"
    try:
        inner(tokens, use_cache=False, output_hidden_states=True, output_attentions=True)
    finally:
        inner.layers = layers
        model.model.config._attn_implementation = implementation


def _fit(data: Path, kind: str, features: int, steps: int, often: int) -> Iterator[dict[str, Any]]:
    """Trainings with their batches from the cache: seconds from one step to the next, Adam included, share of waiting.

    The first training is thrown away: it reads the cache from a cold disk. Memory is by how much the process grows at
    most: weights, gradients, moments, batches, evaluation, calibration and a checkpoint on its way to the disk. The
    number of active features comes down to L0 over the first 30% of a training.
    """
    cache, layer = ActivationCache.open(data / "cache"), read_json(data / "survey" / "layers.json")["first"]
    _training(cache, layer, kind, 2048, steps)
    found = [_training(cache, layer, kind, features, steps) for _ in range(often)]
    step = statistics.median(s for seconds, _, _ in found for s in seconds)
    positions = CONTEXTS * cache.context_length
    yield {
        "work": f"fit, {kind}", "implementation": "ours/batch_topk",
        "shape": {"N": positions, "T": cache.context_length, "d": cache.dims.d_model, "F": features, "L0": 64},
        "seconds_median": step, "peak_bytes": statistics.median(grown for _, _, grown in found),
        "ratio_to_encoder_product": None, "ratio_to_ours": 1.0, "pairs": often, "steps": steps,
        "positions_per_second": positions / step,
        "waited_share": statistics.median(waited for _, waited, _ in found),
    }  # fmt: skip


def _training(
    cache: ActivationCache, layer: int, kind: str, features: int, steps: int
) -> tuple[list[float], float, int]:
    """Seconds of every step but the last, share of them spent waiting for batches, growth of memory in bytes."""
    config = config_class(kind).model_validate(
        {"kind": kind, "layers": [layer], "features": features, "sparsity": {"kind": "batch_topk", "k": 64}}
    )
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    module = build(config, cache.dims)
    sites = (*module.sites, *module.start_sites)
    train, heldout = (Batches(cache, split, wanted, CONTEXTS, 0)
                      for split, wanted in (("train", sites), ("heldout", module.sites)))  # fmt: skip
    schedule = TrainingConfig(steps=steps, start_contexts=8, calibrate_contexts=4, evaluate_every=steps,
                              checkpoint_every=steps)  # fmt: skip
    clocked: Any = _Clocked(train)
    with tempfile.TemporaryDirectory() as work:
        fit(module, clocked, heldout, cache.weights(), schedule, seed=0, work=Path(work), identity="bench")
    seconds = [after - asked for asked, after in itertools.pairwise(clocked.asked)]
    return seconds, sum(clocked.waited[:-1]) / sum(seconds), status("VmHWM") - before


def _kmeans(pairs: int) -> Iterator[dict[str, Any]]:
    """Clusters of 100,000 random loading vectors over 20 heads: the clustering stage beside scikit-learn.

    The stage keeps to one thread, because scikit-learn's k-means on several differs from run to run in its last bits.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    vectors = _loadings()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    def on_one_thread(seed: int) -> None:
        with threadpool_limits(1):
            KMeans(256, n_init="auto", random_state=seed).fit(vectors)

    ways: dict[str, Callable[[Any], Any]] = {
        "ours/clustering stage, 1 thread": lambda seed: cluster_labels(vectors, 256, seed),
        "scikit-learn/KMeans, 1 thread": on_one_thread,
        "scikit-learn/KMeans, 2 threads": lambda seed: KMeans(256, n_init="auto", random_state=seed).fit(vectors),
        "scikit-learn/MiniBatchKMeans, 2 threads": lambda seed: MiniBatchKMeans(
            256, n_init="auto", random_state=seed
        ).fit(vectors),
    }
    yield from _by_turns(_KMEANS, {"F": 100_000}, ways, list(range(pairs + 1)))


def _clustering() -> Iterator[dict[str, Any]]:
    """Everything that the clustering stage does for 100,000 features, once: k-means at every k and seed, the power-law
    fits of cluster sizes with refitted bootstraps and rivals, HDBSCAN, and all that again for three nulls.
    """
    start = time.perf_counter()
    found = analyse_loadings("features", _loadings(), np.ones(100_000, dtype=bool), ClusterConfig(runs=("features",)))
    seconds = time.perf_counter() - start
    done = f"ours/{len(found['sizes'])} clusterings, {len(found['clusters'])} fits"
    yield {"work": _CLUSTERING, "implementation": done, "shape": {"F": 100_000}, "seconds_median": seconds,
           "peak_bytes": None, "ratio_to_encoder_product": None, "ratio_to_ours": 1.0, "pairs": 1}  # fmt: skip


def _loadings() -> np.ndarray:
    """Random loading vectors of 100,000 features over 20 heads of different sizes."""
    generator = np.random.default_rng(0)
    return generator.standard_normal((100_000, 20)) * generator.random(20)


def _smoke(root: Path) -> Iterator[dict[str, Any]]:
    """The smoke profile from nothing, in a clone of what is committed, in this environment."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        subprocess.run(["git", "clone", "--quiet", str(root), str(copy)], check=True)
        (copy / ".venv").symlink_to(Path(shutil.which("python") or "python").parents[1])
        start = time.perf_counter()
        subprocess.run(["make", "-o", ".venv/.installed", "findings", "PROFILE=smoke"], cwd=copy, check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                       env=os.environ | {"PYTHONPATH": str(copy / "src")})  # fmt: skip
        seconds = time.perf_counter() - start
    yield {"work": "smoke profile", "implementation": "ours", "shape": {}, "seconds_median": seconds,
           "peak_bytes": None, "ratio_to_encoder_product": None, "ratio_to_ours": 1.0, "pairs": 1}  # fmt: skip
