r"""QK diagonalization: attention scores as a sum over features of which only feature i's two sides interact.

After Jermyn et al., Progress on Attention (2025). Shape legend: B contexts, T positions, N = B*T rows, E head width,
G heads that share the features, F features, r rank, C = F*r channels, Q functions of distance.

    rank 1   S_g(t,s) = sum_i c_i u_i(t) v_i(s) kappa_gi(t-s),   u = act(W_q q_t + b_q),   v = act(W_k k_s + b_k)
    rank r   S_g(t,s) = sum_i c_i sum_j u_ij(t) v_ij(s) kappa_gij(t-s),
             u_i(t) = gate_i(t) R_i (q_t; 1),   v_i(s) = gate'_i(s) R'_i (k_s; 1),   gate = f / (1 + f), f as u, v above

(scalar gates times fixed vectors would collapse to rank 1). What q and k are is ``position``'s to say: un-rotated ones
with a kernel of relative position, kappa(d) = sum over the model's own frequencies of rho cos(w d + phi) (``rotary``),
or with a constant one (``content``); or the rotated ones (``rotated``). Several heads share one set of features, each
with kernels of its own; encoders then read the concatenated queries and keys.

The beginning-of-text key is the same in every context and has no features: its score is linear in the query side's
channels (design choice). With ``base: mean`` the score of the mean query with every key, and of every query with the
mean key, is given, exactly, and features add the rest (design choice).

Scores are after the layer's scale and before its soft-cap, centred per query over counted keys, because a softmax
ignores a constant, and divided by their root mean square per head. No [T, T, F] tensor is ever built (``pairs``).

Gauge: u, v, kappa and c could trade their scales. Rows of the encoders, R and the kernels keep the norms they start
with; c_i alone is free, at a learning rate of its own. Features compete by pre-activation times n_i = sqrt |c_i|,
so that an L1 penalty is on the two factors of what a pair writes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosshead.attention.pairs import pair_scores
from crosshead.attention.positions import Positions, Tables
from crosshead.attention.qk_config import Config
from crosshead.dictionaries.base import (
    Batch,
    LayerWeights,
    Loss,
    ModelDims,
    ParameterGroup,
    Site,
    Trainable,
)
from crosshead.dictionaries.encoder import Activations, SparseEncoder
from crosshead.maths.codes import SparseCodes
from crosshead.maths.patterns import AttentionSpec
from crosshead.maths.sparse import decode

__all__ = ["Config", "Module", "Sides", "centred"]

_KERNEL_SETTLES = 0.3
"""Share of training after which a feature's kernel keeps its strongest frequencies only."""
_NORM_FLOOR = 0.05
"""Of the mean strength: what a feature counts for in the competition at least, so that none dies of a small c."""


class Sides(NamedTuple):
    """A batch's features on both sides."""

    query: Activations
    key: Activations
    query_channels: SparseCodes
    """u: with rank 1 the query side's codes themselves."""
    key_channels: SparseCodes


class Module(Trainable):
    """A QK diagonalization; see the module's text for its equations."""

    Config = Config
    heads: Tensor
    query_mean: Tensor
    query_scale: Tensor
    key_mean: Tensor
    key_scale: Tensor
    mean_query: Tensor
    mean_key: Tensor
    score_size: Tensor
    first_mean: Tensor
    first_size: Tensor
    query_size: Tensor
    key_size: Tensor
    kernel_size: Tensor

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)
        heads = range(dims.n_heads) if config.heads == "all" else config.heads
        if max(heads) >= dims.n_heads:
            raise ValueError(f"head {max(heads)} is out of range; the model has heads 0 to {dims.n_heads - 1}; "
                             "correct heads")  # fmt: skip
        features, rank, width = config.features, config.rank, dims.head_dim
        self.positions = Positions()
        self.register_buffer("heads", torch.tensor(list(heads)))
        self.key_heads = sorted({h // (dims.n_heads // dims.n_kv_heads) for h in heads})
        widths = (dims.d_model,) * 2
        if config.input == "heads":
            widths = len(heads) * width, len(self.key_heads) * width
        self.query_encoder, self.key_encoder = (SparseEncoder(w, features, config.sparsity) for w in widths)
        n_functions = 2 * (width // 2) + 1 if config.position == "rotary" else 1
        self.strength = nn.Parameter(torch.ones(features))
        self.kernel = nn.Parameter(torch.zeros(features * rank, len(heads), n_functions))
        self.first_affinity = nn.Parameter(torch.zeros(features * rank, len(heads)))
        self.first_level = nn.Parameter(torch.zeros(len(heads)))
        if rank > 1:
            self.query_map, self.key_map = (nn.Parameter(torch.zeros(features * rank, w + 1)) for w in widths)
        for side, w in zip(("query", "key"), widths, strict=True):
            self.register_buffer(f"{side}_mean", torch.zeros(w))
            self.register_buffer(f"{side}_scale", torch.ones(()))
            # Norms that the gauge keeps: encoder rows, then (rank above 1) the features' maps.
            self.register_buffer(f"{side}_size", torch.ones(2, features))
        self.register_buffer("mean_query", torch.zeros(len(heads), width))
        self.register_buffer("mean_key", torch.zeros(len(heads), width))
        self.register_buffer("kernel_size", torch.ones(features))
        self.register_buffer("score_size", torch.ones(len(heads)))
        self.register_buffer("first_mean", torch.zeros(len(heads)))
        self.register_buffer("first_size", torch.ones(len(heads)))

    # ---- what it reads ----

    @property
    def layer(self) -> int:
        """The base-model layer."""
        return self.config.layers[0]

    @property
    def sites(self) -> tuple[Site, ...]:
        names = ("q", "k") if self.config.input == "heads" else ("q", "k", "resid_in")
        return tuple(Site(self.layer, name) for name in names)

    def use_attention_(self, spec: AttentionSpec, tables: Tables | None) -> None:
        """Take the layer's attention spec and the cos and sin that undo its rotation (``ActivationSource.rotary``).

        To be called once, before ``start_``; both are saved with the weights.
        """
        self.positions.set_(spec, tables)

    def queries_keys(self, batch: Batch) -> tuple[Float[Tensor, "B G T E"], Float[Tensor, "B G T E"]]:
        """The heads' rotated queries, and for each the keys that it reads."""
        q, k = (batch[Site(self.layer, name)].to(self.query_mean.dtype) for name in ("q", "k"))
        shared = self.dims.n_heads // self.dims.n_kv_heads
        return q[:, self.heads], k[:, self.heads // shared]

    def raw_inputs(self, batch: Batch) -> tuple[Float[Tensor, "B T Xq"], Float[Tensor, "B T Xk"]]:
        """What the encoders read, not yet centred."""
        if self.config.input == "resid":
            x = batch[Site(self.layer, "resid_in")].to(self.query_mean.dtype)
            x = x / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
            return x, x
        q = batch[Site(self.layer, "q")].to(self.query_mean.dtype)[:, self.heads]
        k = batch[Site(self.layer, "k")].to(self.query_mean.dtype)[:, self.key_heads]
        if self.config.position != "rotated":
            q, k = self.positions.unrotated(q), self.positions.unrotated(k)
        return q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2)

    def inputs(self, batch: Batch) -> tuple[Float[Tensor, "N Xq"], Float[Tensor, "N Xk"]]:
        """What the encoders read: centred, scaled to E||x||^2 = width, zero where nothing counts."""
        assert self.positions.ready, "use_attention_ comes before anything is read"
        q, k = self.raw_inputs(batch)
        mask = batch.mask[..., None]
        q, k = (q - self.query_mean) * self.query_scale * mask, (k - self.key_mean) * self.key_scale * mask
        return q.flatten(0, 1), k.flatten(0, 1)

    # ---- features and what they say ----

    def feature_norms(self) -> Float[Tensor, " F"]:
        """n_i: what a unit activation of either side counts for."""
        size = self.strength.abs()
        return size.clamp(min=_NORM_FLOOR * float(size.detach().mean())).sqrt()

    def sides(self, batch: Batch, progress: float = 1.0, *, for_penalties: bool = False) -> Sides:
        """Features of both sides; rows of positions that do not count are empty."""
        x_query, x_key = self.inputs(batch)
        mask, norms = batch.mask.flatten(), self.feature_norms().detach()
        query, key = (encoder(x, mask, norms, progress, self.engine, for_penalties=for_penalties)
                      for encoder, x in ((self.query_encoder, x_query), (self.key_encoder, x_key)))  # fmt: skip
        if self.config.rank == 1:
            return Sides(query, key, query.codes, key.codes)
        return Sides(query, key, self._channels(query.codes, x_query, self.query_map),
                     self._channels(key.codes, x_key, self.key_map))  # fmt: skip

    def _channels(self, codes: SparseCodes, x: Float[Tensor, "N X"], maps: Float[Tensor, "C X+1"]) -> SparseCodes:
        rank = self.config.rank
        columns = (codes.columns[:, None] * rank + torch.arange(rank, device=x.device)).flatten()
        rows = codes.rows.repeat_interleave(rank)
        read = (x @ maps[:, :-1].T + maps[:, -1])[rows, columns]
        gates = (codes.values / (1.0 + codes.values)).repeat_interleave(rank)
        return SparseCodes(codes.row_offsets * rank, columns, gates * read, codes.n_features * rank)

    def coefficients(self, progress: float = 1.0) -> Float[Tensor, "C G Q"]:
        """Of every channel's kernel in the functions of distance, the feature's strength included."""
        kernel = self.kernel
        wanted, n_frequencies = self.config.kernel_frequencies, (self.kernel.shape[-1] - 1) // 2
        if wanted != "all" and wanted < n_frequencies and progress >= _KERNEL_SETTLES:
            power = (
                kernel.detach()[..., :-1].square().sum(1).view(self.config.features, -1, 2, n_frequencies).sum((1, 2))
            )
            kept = torch.zeros_like(power).scatter(1, power.topk(wanted).indices, 1.0)
            kept = torch.cat([kept, kept, torch.ones_like(kept[:, :1])], dim=1)
            kernel = kernel * kept.repeat_interleave(self.config.rank, 0)[:, None]
        return kernel * self.strength.repeat_interleave(self.config.rank)[:, None, None]

    def basis(self) -> Float[Tensor, "D Q"]:
        """The functions of distance, one row per distance; a single row of one where kernels are constant."""
        if self.config.position != "rotary":
            return torch.ones(1, 1, device=self.strength.device, dtype=self.strength.dtype)
        return self.positions.basis(self.dims.head_dim).to(self.strength)

    def scores(self, batch: Batch, progress: float = 1.0) -> Float[Tensor, "B G T T"]:
        """Predicted scores, raw (after the layer's scale), up to a constant per query. Key 0 is beginning-of-text."""
        return self.scores_of(self.sides(batch, progress), batch, progress)

    def scores_of(self, sides: Sides, batch: Batch, progress: float = 1.0) -> Float[Tensor, "B G T T"]:
        """The same from features at hand."""
        length = batch.mask.shape[1]
        scores = pair_scores(
            sides.query_channels, sides.key_channels, self.coefficients(progress), self.basis(), length, self.engine
        )
        first = decode(sides.query_channels, self.first_affinity, self.engine) + self.first_level
        first = first.view(*batch.mask.shape, -1).permute(0, 2, 1) * self.first_size[:, None] / self.score_size[:, None]
        first = first + (self.first_mean / self.score_size)[:, None]
        scores = torch.cat([first[..., None], scores[..., 1:]], dim=-1) * self.score_size[:, None, None]
        return scores if self.config.base == "none" else scores + self.base_scores(batch)

    def base_scores(self, batch: Batch) -> Float[Tensor, "B G T T"]:
        """Scores of the mean query with every key and of every query with the mean key, less those of both means.

        The beginning-of-text key is left to ``first_level`` and the features.
        """
        q, k = self.queries_keys(batch)
        shape = (*q.shape[1:3], self.dims.head_dim)
        mean_q, mean_k = (
            self.positions.rotated(mean[:, None].expand(shape)) for mean in (self.mean_query, self.mean_key)
        )
        both = mean_q @ (k - mean_k).transpose(-1, -2) + q @ mean_k.transpose(-1, -2)
        return torch.cat([torch.zeros_like(both[..., :1]), both[..., 1:]], dim=-1) * self.positions.scale

    def true_scores(self, batch: Batch) -> Float[Tensor, "B G T T"]:
        """The model's own scores, after the scale and before the soft-cap; nothing is masked."""
        q, k = self.queries_keys(batch)
        return q @ k.transpose(-1, -2) * self.positions.scale

    # ---- training ----

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        sides = self.sides(batch, progress, for_penalties=True)
        predicted, true = self.scores_of(sides, batch, progress), self.true_scores(batch)
        allowed, config = self.positions.allowed(batch.mask), self.config
        size = self.score_size[:, None, None]
        target, error = (centred(x / size, allowed) for x in (true, predicted - true))
        n_pairs = int(allowed.sum()) * len(self.heads)
        squared_error = error.square().sum()
        parts: dict[str, Tensor] = {}
        if config.target != "pattern":
            parts["reconstruction"] = squared_error / max(n_pairs, 1)
            parts["first"] = config.first_weight * self._first_error(predicted - true, allowed, batch.mask)
        if config.target != "scores":
            divergence = self.divergence(predicted, true, batch.mask)[
                batch.mask[:, None].expand(-1, len(size), -1)
            ].mean()
            named = "reconstruction" if config.target == "pattern" else "pattern"
            parts[named] = divergence * (1.0 if config.target == "pattern" else config.pattern_weight)
        norms, n_counted = self.feature_norms(), batch.n_counted
        for encoder, own in ((self.query_encoder, sides.query), (self.key_encoder, sides.key)):
            for name, part in encoder.penalties(own, norms, n_counted, progress).items():
                parts[name] = parts.get(name, 0.0) + part
        n_active = sum(int((own.codes.values.detach() != 0).sum()) for own in sides[:2])
        return Loss(parts, n_active / 2 / max(n_counted, 1), float(squared_error.detach() / target.square().sum()),
                    sides.query.codes.fired() & sides.key.codes.fired())  # fmt: skip

    def _first_error(self, error: Tensor, allowed: Tensor, mask: Bool[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Squared error of the beginning-of-text key's score over the mean of the others, in units of its variance."""
        others = (error * allowed).sum(-1) / allowed.sum(-1).clamp(min=1)
        gap = (error[..., 0] - others) / self.first_size[:, None]
        return gap.square()[mask[:, None].expand_as(gap)].mean()

    def divergence(self, predicted: Tensor, true: Tensor, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B G T"]:
        """KL(model's pattern || predicted one) of every query, beginning-of-text key included."""
        allowed = self.positions.allowed_with_first(mask)
        ours, theirs = (self.positions.log_pattern(x, allowed, self.heads) for x in (predicted, true))
        return (theirs.exp() * allowed * (theirs - ours)).sum(-1)

    def parameter_groups(self) -> list[ParameterGroup]:
        fast, kernels = [self.strength], [self.kernel, self.first_affinity, self.first_level]
        taken = {id(p) for p in (*fast, *kernels)}
        rest = [p for p in self.parameters() if id(p) not in taken]
        return [
            ParameterGroup("encoders", rest, 1.0),
            ParameterGroup("kernels", kernels, self.config.kernel_multiplier),
            ParameterGroup("strengths", fast, self.config.scale_multiplier),
        ]

    @torch.no_grad()
    def project_(self) -> None:
        """Put the gauge back: the norms that features start with."""
        for encoder, maps, sizes in self._gauged():
            _keep_norms_(encoder.weight, sizes[0])
            if maps is not None:
                _keep_norms_(maps.view(self.config.features, -1), sizes[1])
        _keep_norms_(self.kernel.view(self.config.features, -1), self.kernel_size)

    def fix_gauge_(self) -> None:
        """Remember the present norms as those that ``project_`` keeps."""
        with torch.no_grad():
            for encoder, maps, sizes in self._gauged():
                sizes[0] = encoder.weight.norm(dim=1)
                if maps is not None:
                    sizes[1] = maps.view(self.config.features, -1).norm(dim=1)
            self.kernel_size.copy_(self.kernel.view(self.config.features, -1).norm(dim=1))

    def _gauged(self) -> list[tuple[SparseEncoder, Tensor | None, Tensor]]:
        maps = (self.query_map, self.key_map) if self.config.rank > 1 else (None, None)
        return [(self.query_encoder, maps[0], self.query_size), (self.key_encoder, maps[1], self.key_size)]

    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        from crosshead.attention.qk_start import start_

        if not self.positions.ready:
            raise ValueError("a QK diagonalization needs its layer's attention spec and rotary tables; call "
                             "use_attention_(cache.specs[layer], cache.rotary(layer)) before training")  # fmt: skip
        start_(self, batches, generator)

    @torch.no_grad()
    def calibrate_(self, batches: Sequence[Batch]) -> None:
        rows = [(*self.inputs(b), b.mask.flatten()) for b in batches]
        norms = self.feature_norms()
        self.query_encoder.calibrate_([(q, mask) for q, _, mask in rows], norms, self.engine)
        self.key_encoder.calibrate_([(k, mask) for _, k, mask in rows], norms, self.engine)


def _keep_norms_(rows: Float[Tensor, "F X"], sizes: Float[Tensor, " F"]) -> None:
    rows.mul_((sizes / rows.norm(dim=1).clamp(min=1e-12))[:, None])


def centred(scores: Float[Tensor, "B G T T"], allowed: Bool[Tensor, "B 1 T T"]) -> Float[Tensor, "B G T T"]:
    """Scores less their mean over every query's allowed keys; zero at the others."""
    count = allowed.sum(-1, keepdim=True).clamp(min=1)
    scores = scores * allowed
    return (scores - scores.sum(-1, keepdim=True) / count) * allowed
