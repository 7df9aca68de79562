"""What dictionaries of one layer's attention share: what they read, what they predict, and in which units.

Shape legend: B contexts, T positions, N = B*T rows, D = d_model.

They read the residual stream at the layer's input, divided by its rms at every position or scaled by one factor for
all, minus its training mean; features are zero at masked positions, the beginning-of-text token among them. They
predict the attention output, or the residual stream after the layer, centred and scaled to E||y||^2 = D.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from crosshead.dictionaries.base import Batch, Dictionary, ModelDims, Site
from crosshead.dictionaries.starts import Moments

__all__ = ["OneLayer"]


class OneLayer(Dictionary):
    """Base of the dictionaries that carry features of a layer's input to what its attention writes.

    Their configs have ``layers`` (one), ``input`` (normed | resid) and ``target`` (attn_out | resid_out).
    """

    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor

    def __init__(self, config, dims: ModelDims):
        super().__init__(config, dims)
        self.register_buffer("input_mean", torch.zeros(dims.d_model))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("target_mean", torch.zeros(dims.d_model))
        self.register_buffer("target_scale", torch.ones(()))

    @property
    def layer(self) -> int:
        """The base-model layer."""
        return self.config.layers[0]

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "resid_in"), Site(self.layer, "pattern"), Site(self.layer, self.config.target))

    @property
    def target_sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, self.config.target),)

    @property
    def target_widths(self) -> tuple[int, ...]:
        return (self.dims.d_model,)

    def target(self, batch: Batch) -> Float[Tensor, "B T D"]:
        return (batch[self.target_sites[0]].to(self.target_mean.dtype) - self.target_mean) * self.target_scale

    def denormalise(self, prediction: Float[Tensor, "B T D"]) -> dict[Site, Tensor]:
        return {self.target_sites[0]: prediction / self.target_scale + self.target_mean}

    def inputs(self, batch: Batch) -> Float[Tensor, "N D"]:
        """What the encoder reads: normalised residual stream, zero at masked positions."""
        x = self._normed(batch[Site(self.layer, "resid_in")].to(self.input_mean.dtype))
        return (((x - self.input_mean) * self.input_scale) * batch.mask[..., None]).flatten(0, 1)

    def _normed(self, x: Tensor) -> Tensor:
        if self.config.input == "resid":
            return x
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)

    def start_units_(self, batches: Sequence[Batch]) -> Float[Tensor, "n D"]:
        """Set means and scales from counted positions; return what the encoder reads there."""
        inputs = Moments(self._normed(b[Site(self.layer, "resid_in")].float())[b.mask] for b in batches)
        targets = Moments(b[self.target_sites[0]].float()[b.mask] for b in batches)
        self.input_mean.copy_(inputs.mean)
        self.input_scale.fill_(inputs.scale if self.config.input == "resid" else 1.0)
        self.target_mean.copy_(targets.mean)
        self.target_scale.fill_(targets.scale)
        return torch.cat([self.inputs(b)[b.mask.flatten()] for b in batches])

    def trivial_units(self) -> dict[str, Tensor]:
        """The means and scales of a folded dictionary."""
        return {
            "input_mean": torch.zeros_like(self.input_mean),
            "input_scale": torch.ones_like(self.input_scale),
            "target_mean": torch.zeros_like(self.target_mean),
            "target_scale": torch.ones_like(self.target_scale),
        }

    # ---- features as users look at them ----

    @abstractmethod
    def pattern(self, batch: Batch, feature: int) -> Float[Tensor, "B T T"]:
        """P_i(t, s) of one feature; the column of the beginning-of-text token is zero because f_i is zero there."""

    @torch.no_grad()
    def key_side(self, batch: Batch, features: Sequence[int]) -> Float[Tensor, "B T n"]:
        """f_i(s) of the given features."""
        return self.encode(batch).to_dense().view(*batch.mask.shape, -1)[..., list(features)]

    @torch.no_grad()
    def query_side(self, batch: Batch, features: Sequence[int]) -> Float[Tensor, "B T n"]:
        """g_i(t) of the given features."""
        key_side = self.key_side(batch, features)
        per_feature = [self.pattern(batch, i) @ key_side[..., j, None] for j, i in enumerate(features)]
        return torch.cat(per_feature, dim=-1)
