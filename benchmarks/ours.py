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
from crosshead.maths.scan import largest_entries, largest_per_row

Step = Callable[[], torch.nn.Module]


def build(
    implementation: str, inputs: Path, *, l0: int, rows: int, positions: int, heads: int | None = None,
    optimiser: bool = False, keep_memory: bool = True,
) -> Step:  # fmt: skip
    """A step: zero gradients, loss, backward, and Adam's update if ``optimiser``. It returns what it trained.

    ``positions`` of every context and the first ``heads`` heads are used; ``keep_memory`` is ``Machine.prepare``.
    """
    if keep_memory:
        Machine(device="cpu", threads=torch.get_num_threads()).prepare()
    form, _, variant = implementation.partition("/")
    batch, trained = read_batch(inputs, rows, positions), load_dictionary(inputs / "dictionary")
    if heads is not None:
        batch, trained = first_heads(batch, trained, heads)
    module = at_l0(trained, batch, form, l0).train()
    loss = {
        "": lambda: module.loss(batch, 1.0).total,
        "feature-side": lambda: naive_mtc_loss(module, batch, feature_side=True),
        "decoder-side": lambda: naive_mtc_loss(module, batch, feature_side=False),
    }[variant]
    adam = torch.optim.Adam(module.parameters(), lr=1e-5, fused=True) if optimiser else None

    def step() -> torch.nn.Module:
        module.zero_grad(set_to_none=True)
        loss().backward()
        if adam is not None:
            adam.step()
        return module

    return step


def read_batch(inputs: Path, rows: int, positions: int) -> Batch:
    """The first positions of the first contexts of the saved batch."""
    tensors = load_tensors(inputs / "batch.safetensors", "run `make bench` again")
    contexts = rows // positions
    mask, tokens = (tensors.pop(name)[:contexts, :positions].clone() for name in ("mask", "tokens"))
    sites: dict[Site, Tensor] = {}
    for name, tensor in tensors.items():
        layer, site = name.split(".")
        first = tensor[:contexts, ..., :positions, :positions] if site == "pattern" else tensor[:contexts, :positions]
        sites[Site(int(layer), site)] = first.contiguous()  # pyright: ignore[reportArgumentType]
    return Batch(sites, mask, tokens)


@torch.no_grad()
def first_heads(batch: Batch, trained: Any, heads: int) -> tuple[Batch, Dictionary]:
    """A multitoken transcoder and its batch with fewer heads."""
    dims = trained.dims.model_copy(update={"n_heads": heads, "n_kv_heads": 1})
    module = build_dictionary(trained.config, dims)
    state = trained.state_dict()
    state |= {"loadings": state["loadings"][: heads + 1], "bos": state["bos"][:heads],
              "pattern_gram": state["pattern_gram"][: heads + 1, : heads + 1]}  # fmt: skip
    module.load_state_dict(state)
    sites = {site: tensor[:, :heads].contiguous() if site.name == "pattern" else tensor
             for site, tensor in batch.sites.items()}  # fmt: skip
    return Batch(sites, batch.mask, batch.tokens), module


@torch.no_grad()
def at_l0(trained: Dictionary, batch: Batch, form: str, l0: int) -> Dictionary:
    """The trained dictionary with another form of sparsity, biases shifted alike so that ``l0`` features are active.

    For TopK they are shifted until every row has as many positive entries: the peers decode k entries of every row.
    """
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
    if form == "topk":
        per_row = largest_per_row(Product(x, encoder.weight, encoder.bias + 1e3, mask), ones, l0, module.engine)
        encoder.bias -= per_row.values.min() - 1e3 - 1e-3
    if form == "jumprelu":
        theta = 0.1 * float(best.values.std())
        encoder.log_threshold.fill_(torch.tensor(theta).log())
        encoder.bias += theta
    return module


def encoder_inputs(module: Any, batch: Batch) -> Tensor:
    """What the encoder reads."""
    return module.inputs(batch) if module.config.kind == "mtc" else module._inputs(batch)


def naive_mtc_loss(module: Any, batch: Batch, *, feature_side: bool) -> Tensor:
    """The L1 loss with dense matrices and autograd, features moved head by head before or after decoding."""
    x, mask = encoder_inputs(module, batch), batch.mask
    f = torch.relu(torch.addmm(module.encoder.bias, x, module.encoder.weight.T)) * mask.flatten()[:, None]
    penalty = module.config.sparsity.coefficient * (f.sum(0) * module.feature_norms()).sum()
    f = f.view(*mask.shape, -1)
    pattern = batch[Site(module.layer, "pattern")].to(module.decoder.dtype)
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
    return ((y - module.target(batch))[mask].square().sum() + penalty) / mask.sum()
