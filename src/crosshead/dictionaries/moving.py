r"""What dictionaries share whose features are moved by head patterns, each by its own mixture of them.

Shape legend: B contexts, T positions, N = B*T rows, F features, H query heads, M = H + 1 movers (index 0 is the
identity), D = d_model.

    P_i(t,s) = sum_h L_hi A_h(t,s) + L_0i [t = s]                       feature pattern, L: head loadings
    g_i(t)   = sum_s P_i(t,s) f_i(s)                                    query-side activation
    y_t      = b_d + sum_i g_i(t) d_i + sum_h A_h(t,BOS) c_h            prediction

After Jermyn et al., Progress on Attention (2025). The patterns A_h are the base model's own and constant. Features are
zero at the beginning-of-text token; what it contributes is the same in every context and learned as c_h (design
choice). No [T, T, F] tensor is ever built: every head moves its share of the decoded features,
y = sum_h A_h ((f * L_h) D) + (f * L_0) D, and ``mixed_decode`` reads every active d_i once for all heads.

Where f comes from is left to the architecture: ``mtc`` trains it for this prediction, ``joint_mtc`` does not. Their
starts are in ``moving_start``.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from crosshead.dictionaries.base import Batch, DictionaryConfig, ModelDims, ParameterGroup, Site
from crosshead.dictionaries.one_layer import OneLayer
from crosshead.dictionaries.sparsity import Sparsity
from crosshead.maths.codes import SparseCodes
from crosshead.maths.sparse import mixed_decode

__all__ = ["LoadingsPenalty", "Moving", "MovingConfig", "loading_sizes"]

LoadingsPenalty = Literal["gram", "l1", "l2"]


class MovingConfig(DictionaryConfig):
    """Parameters of every dictionary that moves features by head patterns."""

    layers: tuple[int]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The one layer whose attention it replaces."""
    sparsity: Sparsity
    """Which features are active."""
    target: Literal["attn_out", "resid_out"] = "attn_out"
    """Predict the attention output, or the residual stream after the whole layer."""
    input: Literal["normed", "resid"] = "normed"
    """Read the residual stream divided by its rms at every position, or scaled by one factor for all."""
    heads_per_feature: Annotated[int, Field(gt=0)] | Literal["all"] = "all"
    """Every feature keeps this many of its movers (heads and identity); 1 is the Top-1 MTC."""
    assignment: Literal["learned", "fixed"] = "learned"
    """Kept movers: the largest, chosen anew while the others fade out, or those drawn at the start (control).

    The others end without value and without gradient: a straight-through gradient to the end of training keeps the
    choice from settling, because Adam moves every loading by about the learning rate however small its gradient.
    """
    selection: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]] = (0.3, 0.6)
    """Shares of training at which the movers that are not kept begin to fade, and are gone.

    Until then every mover is open. Where features have one head, a choice that begins at once leaves some with a wrong
    one, and the Top-1 dictionary worse than it has to be (planted layers; the log has the figures).
    """
    loadings_sign: Literal["free", "nonnegative"] = "free"
    """Constraint on head loadings."""
    start_identity: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of features that start on the identity."""
    start_noise: Annotated[float, Field(ge=0)] = 0.03
    """Standard deviation of the loadings around their one-hot start."""
    loadings_multiplier: Annotated[float, Field(gt=0)] = 7.5
    """Learning rate of the head loadings over that of everything else."""

    @model_validator(mode="after")
    def _choices_fit(self) -> "MovingConfig":
        begin, end = self.selection
        if begin >= end:
            raise ValueError(f"selection begins at {begin} and ends at {end}; it has to end later")
        if self.assignment == "fixed" and self.heads_per_feature != 1:
            raise ValueError(f"assignment: fixed binds a feature to one mover, but heads_per_feature is "
                             f"{self.heads_per_feature}; set heads_per_feature: 1 or assignment: learned")  # fmt: skip
        return self


class Moving(OneLayer):
    """Base of the dictionaries that move features by head patterns; see the module's text for the equations."""

    fixed_movers: Tensor

    def __init__(self, config, dims: ModelDims):
        super().__init__(config, dims)
        d, features, movers = dims.d_model, config.features, dims.n_heads + 1
        if config.heads_per_feature != "all" and config.heads_per_feature > movers:
            raise ValueError(f"heads_per_feature={config.heads_per_feature} exceeds the {movers} movers (heads and "
                             "identity); lower it or write all")  # fmt: skip
        self.loadings = nn.Parameter(torch.zeros(movers, features))
        self.decoder = nn.Parameter(torch.zeros(features, d))
        self.decoder_bias = nn.Parameter(torch.zeros(d))
        self.bos = nn.Parameter(torch.zeros(dims.n_heads, d))
        self.register_buffer("fixed_movers", torch.zeros(features, dtype=torch.long))

    # ---- the model ----

    def effective_loadings(self, progress: float = 1.0) -> Float[Tensor, "M F"]:
        """Head loadings after keeping each feature's largest movers.

        The others fade out between the two shares of training in ``selection`` and are zero, value and gradient, from
        then on. Until then the choice is open: a mover that grows past the weakest kept one takes its place.
        """
        kept, left = self._kept_movers(), self._unkept_share(progress)
        if kept is None:
            return self.loadings
        ones = kept.to(self.loadings.dtype)
        return self.loadings * (ones + (1 - ones) * left)

    def _kept_movers(self) -> Bool[Tensor, "M F"] | None:
        """Each feature's largest movers, or those drawn at the start; None where it keeps all."""
        wanted, kept = self.config.heads_per_feature, torch.ones_like(self.loadings, dtype=torch.bool)
        if wanted == "all":
            return None
        if self.config.assignment == "fixed":
            return ~kept.scatter(0, self.fixed_movers[None], False)
        weakest = self.loadings.detach().abs().topk(len(kept) - wanted, dim=0, largest=False, sorted=False).indices
        return kept.scatter(0, weakest, False)

    def _unkept_share(self, progress: float) -> float:
        """What is left of the movers that are not kept."""
        begin, end = self.config.selection
        fading = (end - progress) / (end - begin)
        return 0.0 if self.config.assignment == "fixed" else min(1.0, max(0.0, fading))

    def decode(self, codes: SparseCodes, batch: Batch, progress: float = 1.0) -> Float[Tensor, "B T D"]:
        # Movers that have faded out entirely need not be computed.
        movers = self._kept_movers() if self._unkept_share(progress) == 0.0 else None
        pattern = batch[Site(self.layer, "pattern")].to(self.decoder.dtype)
        y = mixed_decode(codes, self.effective_loadings(progress), self.decoder, pattern, self.engine, movers)
        return y + pattern[..., 0].transpose(1, 2) @ self.bos + self.decoder_bias

    def project_(self) -> None:
        if self.config.loadings_sign == "nonnegative":
            with torch.no_grad():
                self.loadings.clamp_(min=0.0)

    def parameter_groups(self) -> list[ParameterGroup]:
        rest = [p for name, p in self.named_parameters() if name != "loadings"]
        return [
            ParameterGroup("loadings", [self.loadings], self.config.loadings_multiplier),
            ParameterGroup("rest", rest, 1.0),
        ]

    def folded_decoder(self) -> dict[str, Tensor]:
        """The decoder, its bias and the first token's term in raw units, as entries of a state."""
        scale = self.target_scale.double()
        return {
            "decoder": self.decoder.double() / scale,
            "decoder_bias": self.decoder_bias.double() / scale + self.target_mean.double(),
            "bos": self.bos.double() / scale,
        }

    # ---- features as users look at them ----

    def head_loadings(self) -> Float[Tensor, "F H"]:
        return self.effective_loadings()[1:].T.detach()

    def pattern(self, batch: Batch, feature: int) -> Float[Tensor, "B T T"]:
        """P_i(t, s) of one feature; the column of the beginning-of-text token is zero because f_i is zero there."""
        loadings = self.effective_loadings().detach()[:, feature]
        heads = batch[Site(self.layer, "pattern")].to(loadings.dtype)
        pattern = torch.einsum("h,bhts->bts", loadings[1:], heads)
        pattern = pattern + loadings[0] * torch.eye(pattern.shape[-1], device=pattern.device)
        return pattern * batch.mask[:, None, :]

    @torch.no_grad()
    def query_side_sums(
        self, batch: Batch, codes: SparseCodes, kept: Bool[Tensor, "K M F"]
    ) -> Float[Tensor, "K B T F"]:
        """g_i(t) of every feature through each of K choices of movers, dense. For analysis, not for training."""
        loadings_KMF = self.effective_loadings() * kept
        dense = codes.to_dense().view(*batch.mask.shape, -1)
        sums = dense * loadings_KMF[:, 0, None, None]
        for h in range(self.dims.n_heads):
            moved = batch[Site(self.layer, "pattern")][:, h] @ dense
            for sum_BTF, loading in zip(sums, loadings_KMF[:, h + 1], strict=True):
                sum_BTF.addcmul_(moved, loading)
        return sums

    @torch.no_grad()
    def contributions(self, batch: Batch) -> Float[Tensor, "M F"]:
        """What each mover writes for each feature: sum over counted t of ||L_hi sum_s A_h(t,s) f_i(s) d_i||^2."""
        codes = self.encode(batch).to_dense().view(*batch.mask.shape, -1)
        patterns = batch[Site(self.layer, "pattern")] * batch.mask[:, None, :, None]
        sums = [codes.square().sum((0, 1))]
        sums += [(patterns[:, h] @ codes).square().sum((0, 1)) for h in range(self.dims.n_heads)]
        return torch.stack(sums) * self.effective_loadings().square() * self.decoder.square().sum(1)

    @torch.no_grad()
    def moved_counts(self, batch: Batch, threshold: float = 0.01) -> tuple[int, int]:
        """Count what is moved in a batch, over counted positions.

        First: (feature, t) with |g_i(t)| ||d_i|| above ``threshold`` times the size of the target at t. Second:
        (feature, s, t) with |P_i(t,s)| f_i(s) ||d_i|| above it.
        """
        codes, loadings = self.encode(batch), self.effective_loadings()
        size = self.decoder.norm(dim=1)
        limit = threshold * self.target(batch).norm(dim=-1)
        n_positions = batch.mask.shape[1]
        moved = triples = 0
        for c in range(len(batch.mask)):
            own = codes.rows // n_positions == c
            source, feature = codes.rows[own] % n_positions, codes.columns[own]
            weight = codes.values[own] * size[feature]
            pattern = batch[Site(self.layer, "pattern")][c]
            to_feature = pattern.new_zeros(n_positions, self.config.features)
            for part in torch.arange(len(source), device=source.device).split(4096):
                # P_i(t, s) at the active (s, i) only: [t, part].
                own_source, own_loadings = source[part], loadings[:, feature[part]]
                parts = pattern.new_zeros(n_positions, len(part))
                for pattern_TT, loading in zip(pattern, own_loadings[1:], strict=True):
                    parts.addcmul_(pattern_TT[:, own_source], loading)
                parts[own_source, torch.arange(len(part), device=part.device)] += own_loadings[0]
                parts = parts * weight[part]
                triples += int((parts.abs() > limit[c, :, None])[batch.mask[c]].sum())
                to_feature.index_add_(1, feature[part], parts)
            moved += int((to_feature.abs() > limit[c, :, None])[batch.mask[c]].sum())
        return moved, triples


def loading_sizes(
    loadings: Float[Tensor, "M F"], pattern_gram: Float[Tensor, "M M"], penalty: LoadingsPenalty
) -> Float[Tensor, " F"]:
    """What a feature's loadings count for: sqrt(L_i' C L_i) with the Gram matrix of patterns, or their l1 or l2 norm.

    C is neutral to a load that is spread over heads of equal patterns; l2 rewards spreading, l1 charges for it.
    """
    if penalty == "l1":
        return loadings.abs().sum(0)
    if penalty == "l2":
        return loadings.square().sum(0).clamp(min=1e-12).sqrt()
    return (loadings * (pattern_gram @ loadings)).sum(0).clamp(min=1e-12).sqrt()
