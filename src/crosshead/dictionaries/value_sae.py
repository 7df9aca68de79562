"""Attention value SAE: a sparse autoencoder on the concatenated value vectors of one or more layers.

After Jermyn et al., Progress on Attention (2025); the penalty of a feature is the sum over layers of its decoder norms,
so that a two-layer loss compares directly with the sum of two one-layer losses (crosscoders, Lindsey et al. 2024).

Shape legend: B contexts, T positions, F features, K key/value heads per layer, H query heads, E head width.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.dictionaries.autoencoder import Autoencoder
from crosshead.dictionaries.base import Batch, DictionaryConfig, LayerWeights, ModelDims, Site
from crosshead.dictionaries.sparsity import Sparsity

__all__ = ["Config", "Module"]


class Config(DictionaryConfig):
    """Parameters of an attention value SAE."""

    kind: Literal["value_sae"] = "value_sae"  # pyright: ignore[reportIncompatibleVariableOverride]
    sparsity: Sparsity
    """Which features are active."""
    norm: Literal["sum_of_layers", "whole"] = "sum_of_layers"
    """n_i: sum over layers of the decoder norm, or the norm of the whole decoder row (rewards spreading; ablation)."""


class Module(Autoencoder):
    """An attention value SAE; see the module's text."""

    Config = Config

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.target_sites

    @property
    def target_sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, "v") for layer in self.config.layers)

    @property
    def target_widths(self) -> tuple[int, ...]:
        return (self.dims.n_kv_heads * self.dims.head_dim,) * len(self.config.layers)

    def raw(self, batch: Batch) -> list[Float[Tensor, "B T width"]]:
        return [batch[site].transpose(1, 2).flatten(2) for site in self.target_sites]

    def denormalise(self, prediction: Float[Tensor, "B T D"]) -> dict[Site, Tensor]:
        heads = (self.dims.n_kv_heads, self.dims.head_dim)
        values = [x.unflatten(-1, heads).transpose(1, 2) for x in self.unscaled(prediction)]
        return dict(zip(self.target_sites, values, strict=True))

    def feature_norms(self) -> Float[Tensor, " F"]:
        if self.config.norm == "whole":
            return self.decoder.norm(dim=1)
        return self.decoder.unflatten(1, (len(self.config.layers), -1)).norm(dim=2).sum(1)

    def head_loadings(self) -> Float[Tensor, "F layers*K"]:
        """Decoder norm per key/value head, all layers side by side (the source's head loading vector)."""
        heads = (len(self.config.layers) * self.dims.n_kv_heads, self.dims.head_dim)
        return self.decoder.detach().unflatten(1, heads).norm(dim=2)

    def query_head_loadings(self, weights: dict[int, LayerWeights]) -> Float[Tensor, "F layers*H"]:
        """||W_O^h d_kv(h)|| per query head: what a feature's value writes through each head, in normalised units."""
        per_layer = self.decoder.detach().unflatten(1, (len(self.config.layers), self.dims.n_kv_heads, -1))
        group = self.dims.n_heads // self.dims.n_kv_heads
        written = []
        for i, layer in enumerate(self.config.layers):
            values = per_layer[:, i].repeat_interleave(group, dim=1) / self.scales[i]
            written.append(torch.einsum("fhe,hed->fhd", values, weights[layer].W_O.to(values)).norm(dim=2))
        return torch.cat(written, dim=1)
