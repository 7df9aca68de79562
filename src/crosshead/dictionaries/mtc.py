r"""Multitoken transcoder (MTC) and its few-heads relatives (Jermyn et al., Progress on Attention, 2025).

Shape legend: B contexts, T positions, N = B*T rows, F features, H query heads, M = H + 1 movers (index 0 is the
identity), D = d_model.

    f_i(s)   = act(w_i . x_s + b_i)                                     key-side activation
    P_i(t,s) = sum_h L_hi A_h(t,s) + L_0i [t = s]                       feature pattern, L: head loadings
    g_i(t)   = sum_s P_i(t,s) f_i(s)                                    query-side activation
    y_t      = b_d + sum_i g_i(t) d_i + sum_h A_h(t,BOS) c_h            prediction

The patterns A_h are the base model's own and constant. Features are zero at the beginning-of-text token; what it
contributes is the same in every context and learned as c_h (design choice). No [T, T, F] tensor is ever built: every
head moves its share of the decoded features, y = sum_h A_h ((f * L_h) D) + (f * L_0) D, and ``mixed_decode`` reads
every active d_i once for all heads.

Penalties weigh feature i by n_i = sqrt(L_i' C L_i) ||d_i||, the size of what it writes when it moves a unit activation;
C is the Gram matrix of the head patterns over training data (design choice; ``loadings_penalty`` has the alternatives).
Keeping the m largest |L_hi| of every feature gives the Top-1 MTC (m = 1) and the dose-response between.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from crosshead.dictionaries.base import (
    Batch,
    Dictionary,
    DictionaryConfig,
    LayerWeights,
    Loss,
    ModelDims,
    ParameterGroup,
    Site,
)
from crosshead.dictionaries.encoder import SparseEncoder
from crosshead.dictionaries.sparsity import Sparsity, folded_sparsity
from crosshead.dictionaries.starts import Moments, ridge
from crosshead.maths.codes import SparseCodes
from crosshead.maths.sparse import mixed_decode

__all__ = ["Config", "Module"]


class Config(DictionaryConfig):
    """Parameters of a multitoken transcoder."""

    kind: Literal["mtc"] = "mtc"  # pyright: ignore[reportIncompatibleVariableOverride]
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
    selection_fraction: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of training over which the movers that are not kept fade out."""
    loadings_sign: Literal["free", "nonnegative"] = "free"
    """Constraint on head loadings."""
    loadings_penalty: Literal["gram", "l1", "l2"] = "gram"
    """Norm of the head loadings in n_i."""
    start: Literal["value_maps", "random"] = "value_maps"
    """Features drawn from each head's own value map (design choice), or random directions with decoder = encoder."""
    start_identity: Annotated[float, Field(ge=0, le=1)] = 0.03
    """Share of features that start on the identity."""
    start_noise: Annotated[float, Field(ge=0)] = 0.03
    """Standard deviation of the loadings around their one-hot start."""
    loadings_multiplier: Annotated[float, Field(gt=0)] = 7.5
    """Learning rate of the head loadings over that of everything else."""

    @model_validator(mode="after")
    def _fixed_means_one(self) -> "Config":
        if self.assignment == "fixed" and self.heads_per_feature != 1:
            raise ValueError(f"assignment: fixed binds a feature to one mover, but heads_per_feature is "
                             f"{self.heads_per_feature}; set heads_per_feature: 1 or assignment: learned")  # fmt: skip
        return self


class Module(Dictionary):
    """A multitoken transcoder; see the module's text for its equations."""

    Config = Config
    input_mean: Tensor
    input_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor
    pattern_gram: Tensor
    fixed_movers: Tensor

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)
        d, features, movers = dims.d_model, config.features, dims.n_heads + 1
        if config.heads_per_feature != "all" and config.heads_per_feature > movers:
            raise ValueError(f"heads_per_feature={config.heads_per_feature} exceeds the {movers} movers (heads and "
                             "identity); lower it or write all")  # fmt: skip
        self.encoder = SparseEncoder(d, features, config.sparsity)
        self.loadings = nn.Parameter(torch.zeros(movers, features))
        self.decoder = nn.Parameter(torch.zeros(features, d))
        self.decoder_bias = nn.Parameter(torch.zeros(d))
        self.bos = nn.Parameter(torch.zeros(dims.n_heads, d))
        self.register_buffer("input_mean", torch.zeros(d))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("target_mean", torch.zeros(d))
        self.register_buffer("target_scale", torch.ones(()))
        self.register_buffer("pattern_gram", torch.eye(movers))
        self.register_buffer("fixed_movers", torch.zeros(features, dtype=torch.long))

    # ---- what it reads and predicts ----

    @property
    def layer(self) -> int:
        """The base-model layer."""
        return self.config.layers[0]

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "resid_in"), Site(self.layer, "pattern"), Site(self.layer, self.config.target))

    @property
    def start_sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "v"),) if self.config.start == "value_maps" else ()

    @property
    def target_sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, self.config.target),)

    @property
    def target_widths(self) -> tuple[int, ...]:
        return (self.dims.d_model,)

    def target(self, batch: Batch) -> Float[Tensor, "B T D"]:
        return (batch[self.target_sites[0]].to(self.decoder.dtype) - self.target_mean) * self.target_scale

    def denormalise(self, prediction: Float[Tensor, "B T D"]) -> dict[Site, Tensor]:
        return {self.target_sites[0]: prediction / self.target_scale + self.target_mean}

    def inputs(self, batch: Batch) -> Float[Tensor, "N D"]:
        """What the encoder reads: normalised residual stream, zero at masked positions."""
        x = self._normed(batch[Site(self.layer, "resid_in")].to(self.decoder.dtype))
        return (((x - self.input_mean) * self.input_scale) * batch.mask[..., None]).flatten(0, 1)

    def _normed(self, x: Tensor) -> Tensor:
        if self.config.input == "resid":
            return x
        return x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)

    # ---- the model ----

    def effective_loadings(self, progress: float = 1.0) -> Float[Tensor, "M F"]:
        """Head loadings after keeping each feature's largest movers.

        The others fade out over the first ``selection_fraction`` of training and are zero, value and gradient, from
        then on. While they fade the choice is open: a mover that grows past the weakest kept one takes its place.
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
        return 0.0 if self.config.assignment == "fixed" else max(0.0, 1.0 - progress / self.config.selection_fraction)

    def feature_norms(self, progress: float = 1.0) -> Float[Tensor, " F"]:
        loadings = self.effective_loadings(progress)
        if self.config.loadings_penalty == "l1":
            size = loadings.abs().sum(0)
        elif self.config.loadings_penalty == "l2":
            size = loadings.square().sum(0).clamp(min=1e-12).sqrt()
        else:
            size = (loadings * (self.pattern_gram @ loadings)).sum(0).clamp(min=1e-12).sqrt()
        return size * self.decoder.norm(dim=1)

    def encode(self, batch: Batch, progress: float = 1.0) -> SparseCodes:
        with torch.no_grad():
            norms = self.feature_norms(progress)
        return self.encoder(self.inputs(batch), batch.mask.flatten(), norms, progress, self.engine).codes

    def decode(self, codes: SparseCodes, batch: Batch, progress: float = 1.0) -> Float[Tensor, "B T D"]:
        # Movers that have faded out entirely need not be computed.
        movers = self._kept_movers() if self._unkept_share(progress) == 0.0 else None
        pattern = batch[Site(self.layer, "pattern")].to(self.decoder.dtype)
        y = mixed_decode(codes, self.effective_loadings(progress), self.decoder, pattern, self.engine, movers)
        return y + pattern[..., 0].transpose(1, 2) @ self.bos + self.decoder_bias

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        x, mask = self.inputs(batch), batch.mask.flatten()
        norms = self.feature_norms(progress)
        activations = self.encoder(x, mask, norms.detach(), progress, self.engine, for_penalties=True)
        target = self.target(batch)[batch.mask]
        error = (self.decode(activations.codes, batch, progress)[batch.mask] - target).square().sum()
        parts = {"reconstruction": error / len(target)}
        parts |= self.encoder.penalties(activations, norms, len(target), progress)
        return Loss.of(parts, activations.codes, error, target)

    def project_(self) -> None:
        if self.config.loadings_sign == "nonnegative":
            with torch.no_grad():
                self.loadings.clamp_(min=0.0)

    @torch.no_grad()
    def folded(self) -> "Module":
        """See ``Dictionary.folded``. With ``input: normed`` the division by every rms stays: it is no linear map.

        TopK keeps its choices, because one factor changes every n_i.
        """
        config = self.config.model_copy(update={"sparsity": folded_sparsity(self.config.sparsity)})
        folded = type(self)(config, self.dims).to(self.decoder)
        encoder = self.encoder.folded_state(self.input_mean, self.input_scale, self.feature_norms())
        scale = self.target_scale.double()
        folded.load_state_dict(self.state_dict() | {f"encoder.{name}": tensor for name, tensor in encoder.items()} | {
            "decoder": self.decoder.double() / scale,
            "decoder_bias": self.decoder_bias.double() / scale + self.target_mean.double(),
            "bos": self.bos.double() / scale,
            "input_mean": torch.zeros_like(self.input_mean),
            "input_scale": torch.ones_like(self.input_scale),
            "target_mean": torch.zeros_like(self.target_mean),
            "target_scale": torch.ones_like(self.target_scale),
        })  # fmt: skip
        folded.engine = self.engine
        return folded.eval()

    def parameter_groups(self) -> list[ParameterGroup]:
        rest = [p for name, p in self.named_parameters() if name != "loadings"]
        return [
            ParameterGroup("loadings", [self.loadings], self.config.loadings_multiplier),
            ParameterGroup("rest", rest, 1.0),
        ]

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
    def key_side(self, batch: Batch, features: Sequence[int]) -> Float[Tensor, "B T n"]:
        """f_i(s) of the given features."""
        return self.encode(batch).to_dense().view(*batch.mask.shape, -1)[..., list(features)]

    @torch.no_grad()
    def query_side(self, batch: Batch, features: Sequence[int]) -> Float[Tensor, "B T n"]:
        """g_i(t) of the given features."""
        key_side = self.key_side(batch, features)
        per_feature = [self.pattern(batch, i) @ key_side[..., j, None] for j, i in enumerate(features)]
        return torch.cat(per_feature, dim=-1)

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
                parts = torch.einsum("hp,htp->tp", loadings[1:, feature[part]], pattern[:, :, source[part]])
                parts[source[part], torch.arange(len(part), device=part.device)] += loadings[0, feature[part]]
                parts = parts * weight[part]
                triples += int((parts.abs() > limit[c, :, None])[batch.mask[c]].sum())
                to_feature.index_add_(1, feature[part], parts)
            moved += int((to_feature.abs() > limit[c, :, None])[batch.mask[c]].sum())
        return moved, triples

    # ---- start and calibration ----

    @torch.no_grad()
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        resid = Site(self.layer, "resid_in")
        inputs = Moments(self._normed(b[resid].float())[b.mask] for b in batches)
        targets = Moments(b[self.target_sites[0]].float()[b.mask] for b in batches)
        self.input_mean.copy_(inputs.mean)
        self.input_scale.fill_(inputs.scale if self.config.input == "resid" else 1.0)
        self.target_mean.copy_(targets.mean)
        self.target_scale.fill_(targets.scale)
        self.pattern_gram.copy_(_pattern_gram([(b[Site(self.layer, "pattern")], b.mask) for b in batches]))

        x = torch.cat([self.inputs(b)[b.mask.flatten()] for b in batches])
        if self.config.start == "value_maps":
            maps = self._base_maps(batches, weights[self.layer], x)
            mover = self._draw_movers(batches, maps, generator)
            source = x[torch.randint(len(x), (self.config.features,), generator=generator).to(x.device)]
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
        self.fixed_movers.copy_(mover)
        noise = torch.randn(self.loadings.shape, generator=generator).to(x.device) * self.config.start_noise
        self.loadings.copy_(nn.functional.one_hot(mover, len(self.loadings)).T.float() + noise)
        self.project_()
        self.encoder.start_bias_(x)
        self._fit_scales(batches[: max(1, len(batches) // 4)], mover)

    def _base_maps(self, batches: Sequence[Batch], layer: LayerWeights, x: Tensor) -> Float[Tensor, "M D D"]:
        """Linear maps from the input to what each mover would write: ridge to its head's values, then W_O."""
        target = torch.cat([self.target(b)[b.mask] for b in batches])
        identity = ridge(x, target)
        value = torch.cat([b[Site(self.layer, "v")].float().transpose(1, 2).flatten(2)[b.mask] for b in batches])
        to_value = ridge(x, value - value.mean(0)).view(x.shape[1], self.dims.n_kv_heads, -1)
        to_value = to_value.repeat_interleave(self.dims.n_heads // self.dims.n_kv_heads, dim=1)
        heads = torch.einsum("dhe,hec->hdc", to_value, layer.W_O.to(x)) * self.target_scale
        return torch.cat([identity[None], heads])

    def _draw_movers(self, batches: Sequence[Batch], maps: Tensor, generator: torch.Generator) -> Tensor:
        """A mover for every feature: heads by their share of the energy they write, a few on the identity."""
        energy = torch.zeros(self.dims.n_heads, device=maps.device)
        for b in batches:
            x = self.inputs(b).view(*b.mask.shape, -1)
            for h in range(self.dims.n_heads):
                energy[h] += (b[Site(self.layer, "pattern")][:, h] @ (x @ maps[h + 1])).square().sum()
        share = self.config.start_identity
        probabilities = torch.cat([energy.new_tensor([share]), (1 - share) * energy / energy.sum()])
        drawn = torch.multinomial(probabilities.cpu(), self.config.features, replacement=True, generator=generator)
        return drawn.to(maps.device)

    def _fit_scales(self, batches: Sequence[Batch], mover: Tensor) -> None:
        """Least squares for c_h and b_d, then for one scale per mover on what is left."""
        first_column = torch.cat([b[Site(self.layer, "pattern")][..., 0].transpose(1, 2)[b.mask] for b in batches])
        target = torch.cat([self.target(b)[b.mask] for b in batches])
        design = torch.cat([first_column, torch.ones_like(first_column[:, :1])], dim=1)
        solution = ridge(design, target, 1e-6)
        self.bos.copy_(solution[:-1])
        self.decoder_bias.copy_(solution[-1])

        gram = target.new_zeros(len(self.loadings), len(self.loadings)).double()
        moment = gram[0].clone()
        remaining = 0.0
        mode = self.training
        self.train()
        for b in batches:
            codes = self.encode(b)
            base = self.decode(codes.with_values(torch.zeros_like(codes.values)), b)
            rest = (self.target(b) - base)[b.mask].double()
            parts = []
            for m in range(len(self.loadings)):
                own = codes.with_values(codes.values * (mover[codes.columns] == m))
                parts.append((self.decode(own, b) - base)[b.mask].double().flatten())
            written = torch.stack(parts)
            gram += written @ written.T
            moment += written @ rest.flatten()
        self.train(mode)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean() + 1e-12)
        scales = torch.linalg.solve(gram, moment).clamp(min=1e-3).to(target.dtype)
        self.decoder.mul_(scales[mover][:, None])
        for b in batches:
            error = (self.target(b) - self.decode(self.encode(b), b))[b.mask]
            remaining = remaining + error.mean(0) / len(batches)
        self.decoder_bias += remaining

    def calibrate_(self, batches: Sequence[Batch]) -> None:
        rows = [(self.inputs(b), b.mask.flatten()) for b in batches]
        with torch.no_grad():
            self.encoder.calibrate_(rows, self.feature_norms(), self.engine)


@torch.no_grad()
def _pattern_gram(batches: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "M M"]:
    """Gram matrix of the identity and the head patterns, beginning-of-text key left out, unit diagonal."""
    total: Tensor | float = 0.0
    for pattern, mask in batches:
        heads = (pattern * mask[:, None, :, None] * mask[:, None, None, :]).double()
        identity = torch.diag_embed(mask.double())[:, None]
        movers = torch.cat([identity, heads], dim=1).transpose(0, 1).flatten(1)
        total = total + movers @ movers.T
    assert isinstance(total, Tensor)
    scale = total.diagonal().clamp(min=1e-12).rsqrt()
    return (total * scale[:, None] * scale).float()
