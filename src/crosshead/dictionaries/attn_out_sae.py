"""Attention output SAE: a sparse autoencoder on a layer's attention output, or on its concatenated head outputs.

After Kissane et al., Interpreting Attention Layer Outputs with Sparse Autoencoders (2024). The concatenated form reads
z_h(t) = sum_s A_h(t, s) v_h(s) before the output projection, which gives every feature a weight on every head.

Shape legend: B contexts, T positions, F features, H query heads, E head width, D width of the target.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.dictionaries.autoencoder import Autoencoder
from crosshead.dictionaries.base import Batch, DictionaryConfig, LayerWeights, ModelDims, Site
from crosshead.dictionaries.sparsity import Sparsity
from crosshead.maths.patterns import expand_kv

__all__ = ["Config", "Module"]


class Config(DictionaryConfig):
    """Parameters of an attention output SAE."""

    kind: Literal["attn_out_sae"] = "attn_out_sae"  # pyright: ignore[reportIncompatibleVariableOverride]
    layers: tuple[int]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The one layer whose attention output it reconstructs."""
    sparsity: Sparsity
    """Which features are active."""
    per_head: bool = False
    """Reconstruct the concatenated head outputs before the output projection instead of their projected sum."""


class Module(Autoencoder):
    """An attention output SAE; see the module's text."""

    Config = Config
    W_O: Tensor
    b_O: Tensor

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)
        if config.per_head:
            self.register_buffer("W_O", torch.zeros(dims.n_heads, dims.head_dim, dims.d_model))
            self.register_buffer("b_O", torch.zeros(dims.d_model))

    @property
    def sites(self) -> tuple[Site, ...]:
        layer = self.config.layers[0]
        return (Site(layer, "pattern"), Site(layer, "v")) if self.config.per_head else self.target_sites

    @property
    def target_sites(self) -> tuple[Site, ...]:
        return (Site(self.config.layers[0], "attn_out"),)

    @property
    def target_widths(self) -> tuple[int, ...]:
        return (self.dims.n_heads * self.dims.head_dim if self.config.per_head else self.dims.d_model,)

    def raw(self, batch: Batch) -> list[Float[Tensor, "B T width"]]:
        if not self.config.per_head:
            return [batch[self.target_sites[0]]]
        pattern, v = (batch[site].to(self.decoder.dtype) for site in self.sites)
        z = pattern @ expand_kv(v, self.dims.n_heads)
        return [z.transpose(1, 2).flatten(2)]

    def denormalise(self, prediction: Float[Tensor, "B T D"]) -> dict[Site, Tensor]:
        (raw,) = self.unscaled(prediction)
        if self.config.per_head:
            raw = raw @ self.W_O.flatten(0, 1) + self.b_O
        return {self.target_sites[0]: raw}

    def feature_norms(self) -> Float[Tensor, " F"]:
        return self.decoder.norm(dim=1)

    def head_loadings(self) -> Float[Tensor, "F H"] | None:
        """Decoder norm per head for the concatenated form; the projected form has no fixed heads (None)."""
        if not self.config.per_head:
            return None
        return self.decoder.detach().unflatten(1, (self.dims.n_heads, self.dims.head_dim)).norm(dim=2)

    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        if self.config.per_head:
            self.W_O.copy_(weights[self.config.layers[0]].W_O)
            self.b_O.copy_(weights[self.config.layers[0]].b_O)
        super().start_(batches, weights, generator)
