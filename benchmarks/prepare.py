"""Trained dictionaries and the rows they are timed on: real activations of the laptop profile's cache."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.ours import at_l0, encoder_inputs
from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.activations.machine import Machine
from crosshead.dictionaries.base import Batch
from crosshead.dictionaries.registry import build, config_class
from crosshead.io.files import fingerprint, read_json, sha256_file
from crosshead.io.tensors import save_tensors
from crosshead.training.fit import TrainingConfig, fit

__all__ = ["L0S", "prepare"]

L0S = (32, 64, 200)
CONTEXTS = 16
STEPS = 60
_FORMAT = 2


def prepare(data: Path, home: Path, kind: str, features: int) -> Path:
    """Train one dictionary of the first layer for ``STEPS`` steps, or take the one that is there; return its folder."""
    made_of = [sha256_file(data / "cache" / "manifest.json"), STEPS, CONTEXTS, _FORMAT]
    folder = home / f"{kind}-{features}-{fingerprint(made_of)}"
    if (folder / "done").exists():
        return folder
    Machine(device="cpu", threads=torch.get_num_threads()).prepare()
    layer = read_json(data / "survey" / "layers.json")["first"]
    cache = ActivationCache.open(data / "cache")
    config = config_class(kind).model_validate(
        {"kind": kind, "layers": [layer], "features": features, "sparsity": {"kind": "batch_topk", "k": 64}}
    )
    module = build(config, cache.dims)
    schedule = TrainingConfig(steps=STEPS, start_contexts=16, calibrate_contexts=8, evaluate_every=STEPS,
                              checkpoint_every=STEPS)  # fmt: skip
    sites = (*module.sites, *module.start_sites)
    train, heldout = (Batches(cache, split, wanted, 4, 0)
                      for split, wanted in (("train", sites), ("heldout", module.sites)))  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    fit(module, train, heldout, cache.weights(), schedule, seed=0, work=folder / "work", identity="bench")
    module.save(folder / "dictionary")
    batch = cache.read("heldout", range(CONTEXTS), module.sites)
    tensors = {str(site): tensor for site, tensor in batch.sites.items()}
    save_tensors(folder / "batch.safetensors", tensors | {"mask": batch.mask, "tokens": batch.tokens})
    if kind != "mtc":
        _save_plain(folder, module, batch)
    (folder / "done").touch()
    return folder


@torch.no_grad()
def _save_plain(folder: Path, module: Any, batch: Batch) -> None:
    """What the peers need: all rows (those that do not count are zero), weights, and biases for every L0."""
    biases = {}
    for l0 in L0S:
        for form, name in (("l1", f"bias-{l0}"), ("topk", f"topk-bias-{l0}")):
            other: Any = at_l0(module, batch, form, l0)
            biases[name] = other.encoder.bias.detach().clone()
    save_file(
        {
            "x": encoder_inputs(module, batch).contiguous(),
            "weight": module.encoder.weight.detach().contiguous(),
            "decoder": module.decoder.detach().contiguous(),
            **biases,
        },
        str(folder / "plain.safetensors"),
    )
