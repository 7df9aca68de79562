"""The peers' training steps, on the same weights and rows. Runs in their environment."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import sae_lens.saes as saes
import torch
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor, nn

# The package imports nnsight for its activation buffer; a version that fits would replace transformers.
for _name in ("nnsight", "nnsight.intervention"):
    sys.modules.setdefault(_name, MagicMock())

from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate  # noqa: E402
from dictionary_learning.trainers.top_k import TopKTrainer  # noqa: E402

Step = Callable[[], nn.Module]


def build(
    implementation: str, inputs: Path, *, l0: int, rows: int, optimiser: bool = False, keep_memory: bool = True
) -> Step:
    """A step: zero gradients, forward, backward, and Adam's update if ``optimiser``. It returns what it trained.

    ``keep_memory`` gives the peers the same allocator settings as ours.
    """
    if keep_memory:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)
    if implementation == _LORSA:
        module, loss = _lorsa(inputs, rows, l0)
    else:
        tensors = load_file(str(inputs / "plain.safetensors"))
        x, weight, decoder = tensors["x"][:rows].contiguous(), tensors["weight"], tensors["decoder"]
        bias = tensors[f"topk-bias-{l0}" if implementation.endswith("topk") else f"bias-{l0}"]
        module, loss = _IMPLEMENTATIONS[implementation](x, weight, bias, decoder, l0)
    adam = torch.optim.Adam(module.parameters(), lr=1e-5, fused=True) if optimiser else None

    def step() -> nn.Module:
        module.zero_grad(set_to_none=True)
        loss().backward()
        if adam is not None:
            adam.step()
        return module

    return step


def _saelens(architecture: str) -> Callable[..., tuple[nn.Module, Callable[[], Tensor]]]:
    def make(x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, l0: int) -> tuple[nn.Module, Callable]:
        features, width = weight.shape
        common = {"d_in": width, "d_sae": features, "device": "cpu", "dtype": "float32"}
        if architecture == "standard":
            sae: Any = saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(**common, l1_coefficient=0.5))
        elif architecture == "topk":
            sae = saes.TopKTrainingSAE(saes.TopKTrainingSAEConfig(**common, k=l0))
        else:
            sae = saes.JumpReLUTrainingSAE(saes.JumpReLUTrainingSAEConfig(**common, l0_coefficient=0.5))
        with torch.no_grad():
            sae.W_enc.copy_(weight.T)
            sae.W_dec.copy_(decoder)
            sae.b_enc.copy_(bias)
        dead = torch.zeros(features, dtype=torch.bool)
        coefficients = {name: float(getattr(c, "value", c)) for name, c in sae.get_coefficients().items()}
        given = {"sae_in": x, "coefficients": coefficients, "dead_neuron_mask": dead, "n_training_steps": 1}
        fields = TrainStepInput.__dataclass_fields__
        given["is_logging_step"] = False
        step_input = TrainStepInput(**{name: value for name, value in given.items() if name in fields})
        return sae, lambda: sae.training_forward_pass(step_input).loss

    return make


def _sparsify(x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, l0: int) -> tuple[nn.Module, Callable]:
    coder: Any = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=len(weight), k=l0), device="cpu")
    with torch.no_grad():
        coder.encoder.weight.copy_(weight)
        coder.encoder.bias.copy_(bias)
        coder.W_dec.copy_(decoder)
    return coder, lambda: coder(x).fvu


def _dictionary_learning(kind: str) -> Callable[..., tuple[nn.Module, Callable[[], Tensor]]]:
    def make(x: Tensor, weight: Tensor, bias: Tensor, decoder: Tensor, l0: int) -> tuple[nn.Module, Callable]:
        common = {"steps": 100_000, "activation_dim": x.shape[1], "dict_size": len(weight), "layer": 0,
                  "lm_name": "bench", "device": "cpu"}  # fmt: skip
        if kind == "standard":
            trainer: Any = StandardTrainerAprilUpdate(**common, l1_penalty=0.5)
        else:
            trainer = TopKTrainer(**common, k=l0)
        module = trainer.ae
        with torch.no_grad():
            module.encoder.weight.copy_(weight)
            module.encoder.bias.copy_(bias)
            module.decoder.weight.copy_(decoder.T)
        return module, lambda: trainer.loss(x, step=10)

    return make


def _lorsa(inputs: Path, rows: int, l0: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Low-rank sparse attention of Llamascopium on the contexts of a multitoken transcoder.

    As many heads as that has features, as many active; random weights, which dense products and a top-k do not notice.
    Both sides at unit mean square; every position counts, where ours passes over the beginning of text.
    """
    from llamascopium.models.lorsa import LorsaConfig, LowRankSparseAttention  # needs a Python below 3.13

    tensors = load_file(str(inputs / "batch.safetensors"))
    features = len(load_file(str(inputs / "dictionary" / "weights.safetensors"))["decoder"])
    contexts = rows // tensors["mask"].shape[1]
    read, written = (next(t for name, t in tensors.items() if name.endswith(f".{site}"))[:contexts].float().contiguous()
                     for site in ("resid_in", "attn_out"))  # fmt: skip
    read, written = (site / site.square().mean().sqrt() for site in (read, written))
    width = read.shape[2]
    config = LorsaConfig(
        hook_point_in="in", hook_point_out="out", d_model=width, expansion_factor=(features + 0.5) / width,
        act_fn="topk", top_k=l0, norm_activation="inference", n_qk_heads=_LORSA_QK_HEADS, d_qk_head=64, rotary_dim=64,
        n_ctx=read.shape[1], dtype=torch.float32, device="cpu",
    )  # fmt: skip
    module = LowRankSparseAttention(config)
    module.init_parameters()
    assert len(module.W_V) == features, "the number of heads comes from a quotient"
    return module, lambda: module.compute_loss({"in": read, "out": written}, return_aux_data=False)


_LORSA = "llamascopium/lorsa"
_LORSA_QK_HEADS = 8
"""About as many as the layer has; its heads must divide the features. More would cost it more."""
_IMPLEMENTATIONS = {
    "saelens/standard": _saelens("standard"),
    "saelens/topk": _saelens("topk"),
    "saelens/jumprelu": _saelens("jumprelu"),
    "dictionary_learning/standard": _dictionary_learning("standard"),
    "dictionary_learning/topk": _dictionary_learning("topk"),
    "sparsify/topk": _sparsify,
}
