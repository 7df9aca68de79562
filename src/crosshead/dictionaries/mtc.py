r"""Multitoken transcoder (MTC) and its few-heads relatives (Jermyn et al., Progress on Attention, 2025).

Shape legend: B contexts, T positions, N = B*T rows, F features, H query heads, M = H + 1 movers (index 0 is the
identity), D = d_model.

    f_i(s)   = act(w_i . x_s + b_i)                                     key-side activation
    P_i(t,s) = sum_h L_hi A_h(t,s) + L_0i [t = s]                       feature pattern, L: head loadings
    g_i(t)   = sum_s P_i(t,s) f_i(s)                                    query-side activation
    y_t      = b_d + sum_i g_i(t) d_i + sum_h A_h(t,BOS) c_h            prediction

How features are moved is in ``moving``; here they are trained for it.

Penalties weigh feature i by n_i = sqrt(L_i' C L_i) ||d_i||, the size of what it writes when it moves a unit activation;
C is the Gram matrix of the head patterns over training data (design choice; ``loadings_penalty`` has the alternatives).
Keeping the m largest |L_hi| of every feature gives the Top-1 MTC (m = 1) and the dose-response between.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from crosshead.dictionaries.base import Batch, LayerWeights, Loss, ModelDims, Site
from crosshead.dictionaries.encoder import SparseEncoder
from crosshead.dictionaries.moving import LoadingsPenalty, Moving, MovingConfig, loading_sizes
from crosshead.dictionaries.moving_start import (
    StartTokens,
    base_maps,
    draw_movers,
    draw_sources,
    fit_scales_,
    pattern_gram,
    start_loadings_,
)
from crosshead.dictionaries.sparsity import folded_sparsity
from crosshead.maths.codes import SparseCodes

__all__ = ["Config", "Module"]


class Config(MovingConfig):
    """Parameters of a multitoken transcoder."""

    kind: Literal["mtc"] = "mtc"  # pyright: ignore[reportIncompatibleVariableOverride]
    loadings_penalty: LoadingsPenalty = "gram"
    """Norm of the head loadings in n_i."""
    start: Literal["value_maps", "random"] = "value_maps"
    """Features drawn from each head's own value map (design choice), or random directions with decoder = encoder."""
    start_tokens: StartTokens = "uniform"
    """Tokens that features of a value map start from: any, or those that the feature's head moves most from."""


class Module(Moving):
    """A multitoken transcoder; see the module's text for its equations."""

    Config = Config
    pattern_gram: Tensor

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)
        self.encoder = SparseEncoder(dims.d_model, config.features, config.sparsity)
        self.register_buffer("pattern_gram", torch.eye(dims.n_heads + 1))

    @property
    def start_sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "v"),) if self.config.start == "value_maps" else ()

    def feature_norms(self, progress: float = 1.0) -> Float[Tensor, " F"]:
        loadings = self.effective_loadings(progress)
        return loading_sizes(loadings, self.pattern_gram, self.config.loadings_penalty) * self.decoder.norm(dim=1)

    def encode(self, batch: Batch, progress: float = 1.0) -> SparseCodes:
        with torch.no_grad():
            norms = self.feature_norms(progress)
        return self.encoder(self.inputs(batch), batch.mask.flatten(), norms, progress, self.engine).codes

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        x, mask = self.inputs(batch), batch.mask.flatten()
        norms = self.feature_norms(progress)
        activations = self.encoder(x, mask, norms.detach(), progress, self.engine, for_penalties=True)
        target = self.target(batch)[batch.mask]
        error = (self.decode(activations.codes, batch, progress)[batch.mask] - target).square().sum()
        parts = {"reconstruction": error / len(target)}
        parts |= self.encoder.penalties(activations, norms, len(target), progress)
        return Loss.of(parts, activations.codes, error, target)

    @torch.no_grad()
    def folded(self) -> "Module":
        """See ``Dictionary.folded``. With ``input: normed`` the division by every rms stays: it is no linear map.

        TopK keeps its choices, because one factor changes every n_i.
        """
        config = self.config.model_copy(update={"sparsity": folded_sparsity(self.config.sparsity)})
        folded = type(self)(config, self.dims).to(self.decoder)
        encoder = self.encoder.folded_state(self.input_mean, self.input_scale, self.feature_norms())
        state = self.state_dict() | {f"encoder.{name}": tensor for name, tensor in encoder.items()}
        folded.load_state_dict(state | self.folded_decoder() | self.trivial_units())
        folded.engine = self.engine
        return folded.eval()

    @torch.no_grad()
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        x = self.start_units_(batches)
        self.pattern_gram.copy_(pattern_gram((b[Site(self.layer, "pattern")], b.mask) for b in batches))
        if self.config.start == "value_maps":
            maps = base_maps(self, batches, weights[self.layer], x)
            mover = draw_movers(self, batches, maps, generator)
            source = x[draw_sources(self, batches, maps, mover, self.config.start_tokens, generator)]
            for m in range(len(self.loadings)):
                mine = mover == m
                direction = nn.functional.normalize(source[mine] @ maps[m], dim=1)
                self.decoder[mine] = direction
                self.encoder.weight[mine] = direction @ maps[m].T
        else:
            mover = torch.randint(len(self.loadings), (self.config.features,), generator=generator).to(x.device)
            noise = torch.randn(self.encoder.weight.shape, generator=generator).to(x.device)
            self.encoder.weight.copy_(nn.functional.normalize(noise, dim=1))
            self.decoder.copy_(self.encoder.weight)
        start_loadings_(self, mover, generator)
        self.encoder.start_bias_(x)
        fit_scales_(self, batches[: max(1, len(batches) // 4)], mover)

    def calibrate_(self, batches: Sequence[Batch]) -> None:
        rows = [(self.inputs(b), b.mask.flatten()) for b in batches]
        with torch.no_grad():
            self.encoder.calibrate_(rows, self.feature_norms(), self.engine)
