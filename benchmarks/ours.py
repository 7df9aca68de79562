"""Our steps, and the multitoken transcoder as dense autograd would train it.

``inputs`` is a folder that ``benchmarks.prepare`` wrote: a trained dictionary and the batch it is timed on.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosshead.activations.machine import Machine
from crosshead.dictionaries.base import Batch, Dictionary, Site
from crosshead.dictionaries.registry import build as build_dictionary
from crosshead.dictionaries.registry import load_dictionary
from crosshead.io.tensors import load_tensors
from crosshead.maths.forms import Product
from crosshead.maths.scan import largest_entries

Step = Callable[[], Any]


def build(implementation: str, inputs: Path, *, l0: int, rows: int, optimiser: bool = False) -> Step:
    """A step: zero gradients, loss, backward, and Adam's update if ``optimiser``."""
    Machine(device="cpu", threads=torch.get_num_threads()).prepare()
    form, _, variant = implementation.partition("/")
    batch = read_batch(inputs, rows)
    module = at_l0(load_dictionary(inputs / "dictionary"), batch, form, l0).train()
    loss = {
        "": lambda: module.loss(batch, 1.0).total,
        "feature-side": lambda: naive_mtc_loss(module, batch, l0, feature_side=True),
        "decoder-side": lambda: naive_mtc_loss(module, batch, l0, feature_side=False),
    }[variant]
    adam = torch.optim.Adam(module.parameters(), lr=1e-5, fused=True) if optimiser else None

    def step() -> None:
        module.zero_grad(set_to_none=True)
        loss().backward()
        if adam is not None:
            adam.step()

    return step


def read_batch(inputs: Path, rows: int) -> Batch:
    """The first contexts of the saved batch."""
    tensors = load_tensors(inputs / "batch.safetensors", "run `make bench` again")
    mask, tokens = tensors.pop("mask"), tensors.pop("tokens")
    contexts = rows // mask.shape[1]
    sites = {Site(int(name.split(".")[0]), name.split(".")[1]): tensor[:contexts].clone()  # pyright: ignore
             for name, tensor in tensors.items()}  # fmt: skip
    return Batch(sites, mask[:contexts].clone(), tokens[:contexts].clone())


@torch.no_grad()
def at_l0(trained: Dictionary, batch: Batch, form: str, l0: int) -> Dictionary:
    """The trained dictionary with another form of sparsity, biases shifted alike so that ``l0`` features are active."""
    sparsity: dict[str, Any] = {
        "topk": {"kind": "topk", "k": l0, "anneal_from": 1.0},
        "batch_topk": {"kind": "batch_topk", "k": l0, "anneal_from": 1.0},
        "l1": {"kind": "l1", "coefficient": 0.5},
        "l1-pre": {"kind": "l1", "coefficient": 0.5, "negative_coefficient": 5e-4},
        "jumprelu": {"kind": "jumprelu", "coefficient": 0.5},
    }[form]
    config = type(trained.config).model_validate(trained.config.model_dump() | {"sparsity": sparsity})
    module = build_dictionary(config, trained.dims)
    module.load_state_dict(trained.state_dict(), strict=False)
    encoder: Any = module.encoder
    x, mask = encoder_inputs(module, batch), batch.mask.flatten()
    ones, count = torch.ones_like(encoder.bias), l0 * int(mask.sum())
    lifted = encoder.bias + 1e3  # so that every entry is positive
    best = largest_entries(Product(x, encoder.weight, lifted, mask), ones, count, module.engine)
    encoder.bias -= best.values.min() - 1e3
    if form == "jumprelu":
        theta = 0.1 * float(best.values.std())
        encoder.log_threshold.fill_(torch.tensor(theta).log())
        encoder.bias += theta
    return module


def encoder_inputs(module: Any, batch: Batch) -> Tensor:
    """What the encoder reads."""
    return module.inputs(batch) if module.config.kind == "mtc" else module._inputs(batch)


def naive_mtc_loss(module: Any, batch: Batch, l0: int, *, feature_side: bool) -> Tensor:
    """The same loss with dense matrices and autograd, features moved head by head before or after decoding."""
    x, mask = encoder_inputs(module, batch), batch.mask
    pre = torch.addmm(module.encoder.bias, x, module.encoder.weight.T)
    with torch.no_grad():
        scores = (pre * module.feature_norms()).masked_fill(~mask.flatten()[:, None], 0.0)
        least = scores.flatten().kthvalue(scores.numel() - l0 * int(mask.sum()) + 1).values.clamp(min=1e-30)
        active = scores >= least
    f = (pre * active).view(*mask.shape, -1)
    pattern = batch[Site(module.layer, "pattern")]
    if feature_side:
        moved = f * module.loadings[0]
        for h in range(pattern.shape[1]):
            moved = moved + (pattern[:, h] @ f) * module.loadings[h + 1]
        y = moved @ module.decoder
    else:
        y = (f * module.loadings[0]) @ module.decoder
        for h in range(pattern.shape[1]):
            y = y + pattern[:, h] @ ((f * module.loadings[h + 1]) @ module.decoder)
    y = y + pattern[..., 0].transpose(1, 2) @ module.bos + module.decoder_bias
    return (y - module.target(batch))[mask].square().sum() / mask.sum()
