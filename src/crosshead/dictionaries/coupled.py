"""A residual-stream SAE whose features something else carries to what the layer's attention writes.

Shape legend: B contexts, T positions, N = B*T rows, F features, D = d_model.

    f_i(s) = act(w_i . x_s + b_i),   x_hat = f S + b_s,   ||x - x_hat||^2 + lambda_s sum_i f_i n_i (+ its negative twin)

x is what a multitoken transcoder of the layer reads. Input and output lie at one position: there is no attention in it.
n_i = ||S_i||, in penalties and in the competition of the top-k forms alike, so the SAE alone says what is active; how
its features get to the prediction is the subclasses' part. These are the baselines for QK/OV coupling of Jermyn et al.,
Progress on Attention (2025).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from crosshead.dictionaries.base import Batch, ModelDims, Site
from crosshead.dictionaries.encoder import SparseEncoder
from crosshead.dictionaries.one_layer import OneLayer
from crosshead.dictionaries.starts import near_rows
from crosshead.maths.codes import SparseCodes
from crosshead.maths.sparse import decode

__all__ = ["Coupled", "SAEStep"]


class SAEStep(NamedTuple):
    """What the SAE makes of a batch in training."""

    codes: SparseCodes
    error: Tensor
    """Summed squared error at counted positions."""
    penalties: dict[str, Tensor]
    inputs: Float[Tensor, "n D"]
    """Counted rows of what it reads and reconstructs."""


class Coupled(OneLayer):
    """Base of the dictionaries whose activations are a residual-stream SAE's; see the module's text."""

    def __init__(self, config, dims: ModelDims):
        super().__init__(config, dims)
        self.encoder = SparseEncoder(dims.d_model, config.features, config.sparsity)
        self.sae_decoder = nn.Parameter(torch.zeros(config.features, dims.d_model))
        self.sae_bias = nn.Parameter(torch.zeros(dims.d_model))

    @property
    def start_sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "v"),)

    def feature_norms(self) -> Float[Tensor, " F"]:
        """n_i of the SAE: the size of its own decoder rows, whatever the features write elsewhere."""
        return self.sae_decoder.norm(dim=1)

    def encode(self, batch: Batch, progress: float = 1.0) -> SparseCodes:
        with torch.no_grad():
            norms = self.feature_norms()
        return self.encoder(self.inputs(batch), batch.mask.flatten(), norms, progress, self.engine).codes

    def autoencode(self, codes: SparseCodes) -> Float[Tensor, "N D"]:
        """The SAE's reconstruction of its input."""
        return decode(codes, self.sae_decoder, self.engine) + self.sae_bias

    def sae_step(self, batch: Batch, progress: float) -> SAEStep:
        """Activations, error and penalties, with gradients for the SAE."""
        x, mask = self.inputs(batch), batch.mask.flatten()
        norms = self.feature_norms()
        activations = self.encoder(x, mask, norms.detach(), progress, self.engine, for_penalties=True)
        counted = x[mask]
        error = (self.autoencode(activations.codes)[mask] - counted).square().sum()
        penalties = self.encoder.penalties(activations, norms, len(counted), progress)
        return SAEStep(activations.codes, error, penalties, counted)

    def start_sae_(self, x: Float[Tensor, "n D"], batch: Batch, generator: torch.Generator) -> Int[Tensor, " F"]:
        """Start near random counted inputs ``x``, the decoder scaled on ``batch``; return which rows of ``x``."""
        directions, chosen = near_rows(x, self.config.features, generator)
        self.sae_decoder.copy_(directions)
        self.encoder.weight.copy_(directions)
        self.encoder.start_bias_(x)
        mode = self.training
        self.train()
        counted = batch.mask.flatten()
        written, target = self.autoencode(self.encode(batch))[counted], self.inputs(batch)[counted]
        self.train(mode)
        # One least-squares factor on all rows: a start at the data's own magnitude.
        factor = (written * target).sum() / written.square().sum().clamp(min=1e-12)
        self.sae_decoder.mul_(factor.clamp(min=1e-3))
        return chosen

    def calibrate_(self, batches: Sequence[Batch]) -> None:
        rows = [(self.inputs(b), b.mask.flatten()) for b in batches]
        with torch.no_grad():
            self.encoder.calibrate_(rows, self.feature_norms(), self.engine)

    def folded_sae(self) -> dict[str, Tensor]:
        """The SAE for uncentred, unscaled inputs, as entries of a state. One factor changes every n_i."""
        encoder = self.encoder.folded_state(self.input_mean, self.input_scale, self.feature_norms())
        scale = self.input_scale.double()
        return {f"encoder.{name}": tensor for name, tensor in encoder.items()} | {
            "sae_decoder": self.sae_decoder.double() / scale,
            "sae_bias": self.sae_bias.double() / scale + self.input_mean.double(),
        }
