"""What a model of one layer's attention reads and predicts, and in which units.

Shape legend: B contexts, T positions, D = d_model.

It reads the residual stream at the layer's input divided by its rms at every position, minus the training mean, zero at
masked positions; it predicts the attention output, centred and scaled to E||y||^2 = D: as the dictionaries of
``dictionaries.one_layer`` do, so that errors compare.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.dictionaries.base import Batch, ModelDims, Site, Trainable
from crosshead.dictionaries.starts import Moments

__all__ = ["LayerUnits"]


class LayerUnits(Trainable):
    """Base of models that predict a layer's attention output from its normed input."""

    input_mean: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, config, dims: ModelDims):
        super().__init__(config, dims)
        self.register_buffer("input_mean", torch.zeros(dims.d_model))
        self.register_buffer("target_mean", torch.zeros(dims.d_model))
        self.register_buffer("target_scale", torch.ones(()))

    @property
    def layer(self) -> int:
        """The base-model layer."""
        return self.config.layers[0]

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "resid_in"), Site(self.layer, "attn_out"))

    @property
    def target_sites(self) -> tuple[Site, ...]:
        """The site that is predicted."""
        return (Site(self.layer, "attn_out"),)

    @property
    def target_widths(self) -> tuple[int, ...]:
        """Its width."""
        return (self.dims.d_model,)

    def inputs(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """The normed residual stream, centred, zero at masked positions."""
        x = _normed(batch[Site(self.layer, "resid_in")].to(self.input_mean.dtype))
        return (x - self.input_mean) * batch.mask[..., None]

    def target(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """The true attention output, centred and scaled."""
        return (batch[self.target_sites[0]].to(self.target_mean.dtype) - self.target_mean) * self.target_scale

    def denormalise(self, prediction: Float[Tensor, "B T D"]) -> dict[Site, Tensor]:
        """A prediction in raw units, by its site."""
        return {self.target_sites[0]: prediction / self.target_scale + self.target_mean}

    def start_units_(self, batches: Sequence[Batch]) -> None:
        """Set means and the scale from counted positions."""
        inputs = Moments(_normed(b[Site(self.layer, "resid_in")].float())[b.mask] for b in batches)
        targets = Moments(b[self.target_sites[0]].float()[b.mask] for b in batches)
        self.input_mean.copy_(inputs.mean)
        self.target_mean.copy_(targets.mean)
        self.target_scale.fill_(targets.scale)


def _normed(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
