"""Joint SAE and multitoken transcoder: the SAE alone decides what is active, head loadings move it.

After Jermyn et al., Progress on Attention (2025): an SAE of the layer's input (``coupled``) and a second decoder with
head loadings that predicts a transcoder's target from the SAE's activations. Theirs has one head per feature
(``heads_per_feature: 1``); with ``all``, the default as in ``mtc``, the SAE is under a full MTC decoder, which
separates coupling from superposition (design choice).

    loss = ||x - x_hat||^2 + penalties of the SAE  +  ||y - y_hat(sg f)||^2          sg: no gradient

The source interleaves SAE and MTC steps over the same batches. Here both are one loss: the first part has gradients for
encoder, SAE decoder and SAE bias only, the second for decoder, loadings, bias and first-token term only, so that every
parameter gets the gradient that a step of its own kind would give it, and Adam, whose moments are kept for each
parameter, the same update. Two steps on a batch differ in one thing: the MTC's would see activations of the encoder
after the SAE's step instead of before it. ``training.gradient_clip`` multiplies the gradients of both parts by one
factor, which ties their sizes together and nothing else.

``target``, ``decode``, ``reconstruct`` and ``reconstruction`` are the MTC's; the SAE's own error is the part ``sae``.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from crosshead.dictionaries.base import Batch, LayerWeights, Loss, ModelDims
from crosshead.dictionaries.coupled import Coupled
from crosshead.dictionaries.moving import Moving, MovingConfig
from crosshead.dictionaries.moving_start import base_maps, draw_movers, fit_scales_, start_loadings_
from crosshead.dictionaries.sparsity import folded_sparsity

__all__ = ["Config", "Module"]


class Config(MovingConfig):
    """Parameters of a joint SAE and multitoken transcoder."""

    kind: Literal["joint_mtc"] = "joint_mtc"  # pyright: ignore[reportIncompatibleVariableOverride]


class Module(Coupled, Moving):
    """A joint SAE and multitoken transcoder; see the module's text."""

    Config = Config

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        sae = self.sae_step(batch, progress)
        target = self.target(batch)[batch.mask]
        error = (self.decode(sae.codes.detach(), batch, progress)[batch.mask] - target).square().sum()
        parts = {"reconstruction": error / len(target), "sae": sae.error / len(target)} | sae.penalties
        return Loss.of(parts, sae.codes, error, target)

    @torch.no_grad()
    def folded(self) -> "Module":
        """See ``Dictionary.folded``. With ``input: normed`` the division by every rms stays: it is no linear map."""
        config = self.config.model_copy(update={"sparsity": folded_sparsity(self.config.sparsity)})
        folded = type(self)(config, self.dims).to(self.decoder)
        folded.load_state_dict(self.state_dict() | self.folded_sae() | self.folded_decoder() | self.trivial_units())
        folded.engine = self.engine
        return folded.eval()

    @torch.no_grad()
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        x = self.start_units_(batches)
        maps = base_maps(self, batches, weights[self.layer], x)
        mover = draw_movers(self, batches, maps, generator)
        source = x[self.start_sae_(x, batches[0], generator)]
        for m in range(len(self.loadings)):
            mine = mover == m
            self.decoder[mine] = nn.functional.normalize(source[mine] @ maps[m], dim=1)
        start_loadings_(self, mover, generator)
        fit_scales_(self, batches[: max(1, len(batches) // 4)], mover)
