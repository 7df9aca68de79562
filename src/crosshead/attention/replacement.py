r"""Attention replacement layer (ARL): a wide attention layer of simple heads in the place of the base model's own.

After Jermyn et al., Progress on Attention (2025): many more heads than the base layer has, trained on the squared error
to its output from the same input; a feature is a head.

Shape legend: B contexts, T positions, N = B*T rows, D = d_model, M heads, G groups that share a pattern (G = M for
plain heads), E = e width of queries and keys, W = width of what a group moves, C = G W columns.

    q_g(t) = W_Q,g x_t + b_g,   k_g(s) = W_K,g x_s + c_g              turned by some of the base layer's frequencies
    A_g(t,s) = softmax_s(q_g(t) . k_g(s) / sqrt(e) + [s = BOS] r_g)   causal
    z_g(t)   = sum_s A_g(t,s) v_g(s),   v_g(s) = W_V,g x_s
    y_t      = b_d + sum_j gate_j z_j(t) W_O,j

The beginning-of-text token is the same in every context: its key, its value and the pull r of every head towards it are
learned by themselves (design choice), so sum_j A_j(t,BOS) c_j with c_j = value times W_O,j is among what is written.

Loss: ||y - y_hat||^2 + 1/2 lambda_qk (||W_Q||_F^2 + ||W_K||_F^2) + 1/2 lambda_ov (||W_V||_F^2 + ||W_O||_F^2): the
least value of each penalty over all factors of a form is its nuclear norm (Mazumder et al. 2010). They are loss terms,
no weight decay, because Adam would rescale that. ``replacement_config`` has the other penalties and the three variants:
plain heads; rank-1 heads of which the strongest k write (He et al. 2025), in groups; sparse features moved by sparse QK
features.

Memory: ``wide``. Where queries and keys start: ``replacement_start``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosshead.attention import wide
from crosshead.attention.narrow_rotary import Tables, frequencies_of, rotate, tables_factor
from crosshead.attention.replacement_config import Combined, Config, NoPatternPenalty, Plain, RankOne
from crosshead.attention.replacement_start import start_replacement_
from crosshead.attention.units import LayerUnits
from crosshead.dictionaries.base import Batch, LayerWeights, Loss, ModelDims, ParameterGroup, Site
from crosshead.dictionaries.encoder import Activations, SparseEncoder
from crosshead.maths.patterns import AttentionSpec

__all__ = ["WRITES", "Config", "Module", "Moved"]

WRITES = 0.01
"""A head is active where it writes more than this share of the target's size."""


class Moved(NamedTuple):
    """What heads bring to every position, before gates and the choice of the strongest."""

    z_NC: Float[Tensor, "N C"]
    cost: Tensor | None
    """Pattern penalty, summed over groups and counted positions."""
    codes: Activations | None
    """combined: the key-side features."""


class Module(LayerUnits):
    """An attention replacement layer; see the module's text for its equations."""

    Config = Config
    frequency: Tensor
    base_frequency: Tensor
    base_rotated: Tensor
    base_interleaved: Tensor
    base_factor: Tensor
    base_scale: Tensor

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)
        d, e, groups = dims.d_model, config.head_dim, config.groups
        columns = groups * self.width
        self.query = nn.Parameter(torch.zeros(groups, e, d))
        self.key = nn.Parameter(torch.zeros(groups, e, d))
        self.query_bias = nn.Parameter(torch.zeros(groups, e))
        self.key_bias = nn.Parameter(torch.zeros(groups, e))
        self.bos_key = nn.Parameter(torch.zeros(groups, e))
        self.bos_score = nn.Parameter(torch.zeros(groups))
        self.bos_value = nn.Parameter(torch.zeros(columns))
        self.out = nn.Parameter(torch.zeros(columns, d))
        self.decoder_bias = nn.Parameter(torch.zeros(d))
        if isinstance(config.variant, Combined):
            self.encoder = SparseEncoder(d, columns, config.variant.sparsity)
            self.phase = nn.Parameter(torch.zeros(groups, e))
        else:
            self.value = nn.Parameter(torch.zeros(columns, d))
        if config.gates is not None:
            self.gate = nn.Parameter(torch.ones(config.features))
        pairs = e if isinstance(config.variant, Combined) else e // 2
        self.register_buffer("frequency", torch.zeros(groups, pairs))
        self.register_buffer("base_frequency", torch.zeros(max(dims.head_dim // 2, 1)))
        self.register_buffer("base_rotated", torch.zeros((), dtype=torch.long))
        self.register_buffer("base_interleaved", torch.zeros((), dtype=torch.bool))
        self.register_buffer("base_factor", torch.ones(()))
        self.register_buffer("base_scale", torch.zeros(()))

    @property
    def width(self) -> int:
        """W, columns of a group: e for plain heads, otherwise its number of heads."""
        config = self.config
        return config.head_dim if isinstance(config.variant, Plain) else config.features // config.groups

    @property
    def start_sites(self) -> tuple[Site, ...]:
        if self.config.start == "random":
            return ()
        return Site(self.layer, "q"), Site(self.layer, "k")

    @torch.no_grad()
    def use_attention_(self, spec: AttentionSpec, tables: Tables | None) -> None:
        """Take over the layer's rotary embedding and scale, from its spec and the cos and sin that undo its rotation.

        To be called once, before ``start_``. Without tables heads see content alone. A soft-cap, a window or sinks of
        the base layer are not taken over. ValueError for tables that are not linear in the position.
        """
        self.base_scale.fill_(spec.scale)
        if tables is None:
            return
        found = frequencies_of(*tables, interleaved=spec.rotary_interleaved)
        self.base_frequency.zero_()[: len(found)] = found
        self.base_rotated.fill_(2 * len(found))
        self.base_interleaved.fill_(spec.rotary_interleaved)
        self.base_factor.fill_(tables_factor(*tables))

    # ---- where: patterns ----

    def queries_keys(self, batch: Batch) -> tuple[Float[Tensor, "B G T E+1"], Float[Tensor, "B G T E+1"]]:
        """Queries and keys as scores are taken of them: turned by position, the first token's key put in."""
        x = self.inputs(batch)
        q, k = (self._mapped(x, maps, bias) for maps, bias in
                ((self.query, self.query_bias), (self.key, self.key_bias)))  # fmt: skip
        bos = self.bos_key[None, :, None].expand(len(x), -1, -1, -1)
        if isinstance(self.config.variant, Combined):
            q, k = (_strongest(side, self.config.variant.qk_active) for side in (q, k))
            phase = self.phase[:, None]
            q = torch.stack((q * phase.cos(), q * phase.sin()), -1).flatten(-2)
            k, bos = (torch.stack((side, torch.zeros_like(side)), -1).flatten(-2) for side in (k, bos))
        q, k = (rotate(side, self.frequency) for side in (q, torch.cat([bos, k[:, :, 1:]], 2)))
        # One more coordinate, 1 in every query, holds the pull towards the first token, whatever the distance.
        pull = nn.functional.pad(self.bos_score[:, None] / self.scale, (0, k.shape[2] - 1))[None, ..., None]
        return nn.functional.pad(q, (0, 1), value=1.0), torch.cat([k, pull.expand(len(k), -1, -1, -1)], -1)

    def _mapped(self, x: Float[Tensor, "B T D"], maps: Tensor, bias: Tensor) -> Float[Tensor, "B G T E"]:
        mapped = torch.addmm(bias.flatten(), x.flatten(0, 1), maps.flatten(0, 1).T)
        return mapped.view(*x.shape[:2], *bias.shape).transpose(1, 2)

    @property
    def scale(self) -> float:
        """Factor on scores."""
        return self.config.head_dim**-0.5

    @torch.no_grad()
    def patterns(self, batch: Batch, groups: slice) -> Float[Tensor, "B g T T"]:
        """Patterns of some groups. Ask for few at a time."""
        q, k = self.queries_keys(batch)
        return wide.patterns(q[:, groups], k[:, groups], wide.allowed_keys(batch.mask), self.scale)

    # ---- what: values ----

    def values(self, batch: Batch, progress: float = 1.0) -> tuple[Float[Tensor, "B G T W"], Activations | None]:
        """What every group moves from a position; combined: sparse codes, returned beside it."""
        x, mask = self.inputs(batch), batch.mask
        rows, codes = x.flatten(0, 1), None
        if isinstance(self.config.variant, Combined):
            norms = self.out.detach().norm(dim=1)
            codes = self.encoder(rows, mask.flatten(), norms, progress, self.engine, for_penalties=True)
            v = codes.codes.to_dense()
        else:
            v = rows @ self.value.T
        v_BTC = v.view(*mask.shape, -1)
        v_BTC = torch.cat([self.bos_value.expand(len(x), 1, -1), v_BTC[:, 1:]], 1)
        return v_BTC.unflatten(-1, (self.config.groups, self.width)).transpose(1, 2), codes

    # ---- the layer ----

    def moved(self, batch: Batch, progress: float = 1.0) -> Moved:
        """What every column brings; heads whose gate is 0 are computed as well."""
        q, k = self.queries_keys(batch)
        v, codes = self.values(batch, progress)
        penalty = None if isinstance(self.config.pattern, NoPatternPenalty) else self.config.pattern
        z, cost = wide.attend(q, k, v, batch.mask, scale=self.scale, penalty=penalty,
                               limit_mib=self.config.patterns_mib)  # fmt: skip
        return Moved(z.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), cost, codes)

    def encode(self, batch: Batch, progress: float = 1.0) -> Float[Tensor, "N C"]:
        """What heads bring to every position, gated; rank_one: zero but for the strongest."""
        return self.gated(self.moved(batch, progress).z_NC, progress)

    def gated(self, z_NC: Float[Tensor, "N C"], progress: float = 1.0) -> Float[Tensor, "N C"]:
        """The same after gates and the choice of the heads that write."""
        if self.config.gates is not None:
            z_NC = z_NC * self.column_gates
        variant = self.config.variant
        return z_NC if not isinstance(variant, RankOne) else z_NC * self._chosen(z_NC, variant, progress)

    @property
    def column_gates(self) -> Float[Tensor, " C"]:
        """The gate of every column's head."""
        return self.gate.repeat_interleave(len(self.out) // self.config.features)

    @torch.no_grad()
    def _chosen(self, z_NC: Tensor, variant: RankOne, progress: float) -> Bool[Tensor, "N C"]:
        share = _rise(progress if self.training else 1.0, 0.0, variant.anneal_fraction)
        k = min(round(variant.active * (variant.anneal_from + (1 - variant.anneal_from) * share)), z_NC.shape[1])
        sizes = z_NC.abs() * self.out.norm(dim=1)
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        return kept.scatter(1, sizes.topk(k, dim=1, sorted=False).indices, True)

    def decode(self, z_NC: Float[Tensor, "N C"], batch: Batch) -> Float[Tensor, "B T D"]:
        """The predicted attention output in normalised units."""
        return torch.addmm(self.decoder_bias, z_NC, self.out).view(*batch.mask.shape, -1)

    @torch.no_grad()
    def reconstruct(self, batch: Batch) -> dict[Site, Tensor]:
        """Raw predicted activations per target site."""
        return self.denormalise(self.decode(self.encode(batch), batch))

    @torch.no_grad()
    def sizes(self, z_NC: Float[Tensor, "N C"]) -> Float[Tensor, "N M"]:
        """Length of what every head writes."""
        out_MWD = self.out.unflatten(0, (self.config.features, -1))
        if out_MWD.shape[1] == 1:
            return z_NC.abs() * self.out.norm(dim=1)
        gram_MWW = out_MWD @ out_MWD.transpose(1, 2)
        z_MNW = z_NC.unflatten(1, (self.config.features, -1)).transpose(0, 1)
        return ((z_MNW @ gram_MWW) * z_MNW).sum(-1).clamp(min=0).sqrt().T

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        moved, mask = self.moved(batch, progress), batch.mask
        z = self.gated(moved.z_NC, progress)
        target = self.target(batch)[mask]
        error = (self.decode(z, batch)[mask] - target).square().sum()
        parts = {"reconstruction": error / len(target)} | self._penalties(moved, len(target), progress)
        with torch.no_grad():
            active = self.sizes(z[mask.flatten()]) > WRITES * target.norm(dim=1, keepdim=True)
            normalised = float(error / target.square().sum())
        return Loss(parts, float(active.sum() / max(len(target), 1)), normalised, active.any(0))

    def _penalties(self, moved: Moved, n_counted: int, progress: float) -> dict[str, Tensor]:
        config = self.config
        warm, parts = _rise(progress, 0.0, config.warmup_fraction), {}
        if config.lambda_qk > 0:
            parts["nuclear_qk"] = 0.5 * config.lambda_qk * warm * (self.query.square().sum() + self.key.square().sum())
        if config.lambda_ov > 0:
            maps = self.encoder.weight if isinstance(config.variant, Combined) else self.value
            parts["nuclear_ov"] = 0.5 * config.lambda_ov * warm * (maps.square().sum() + self.out.square().sum())
        if moved.cost is not None:
            parts["pattern"] = config.pattern.coefficient * warm * moved.cost / (n_counted * config.groups)
        if config.gates is not None:
            gates = config.gates
            rate = gates.coefficient * _rise(progress, gates.start_fraction, gates.warmup_fraction)
            parts["gates"] = rate * (self.gate * self.map_sizes()).sum()
        if moved.codes is not None:
            norms = self.out.norm(dim=1)
            parts |= self.encoder.penalties(moved.codes, norms, n_counted, progress)
        return parts

    def map_sizes(self) -> Float[Tensor, " M"]:
        """||W_V,j|| ||W_O,j|| of every head, Frobenius norms."""
        maps = self.encoder.weight if isinstance(self.config.variant, Combined) else self.value
        by_head = (m.unflatten(0, (self.config.features, -1)).square().sum((1, 2)) for m in (maps, self.out))
        return math.prod(squares.clamp(min=1e-12).sqrt() for squares in by_head)  # pyright: ignore

    @torch.no_grad()
    def project_(self) -> None:
        """Gates stay between 0 and 1, and those at 0 dead."""
        if self.config.gates is not None:
            dead = self.gate <= 0
            self.gate.clamp_(0.0, 1.0)
            self.out.masked_fill_(dead.repeat_interleave(len(self.out) // len(dead))[:, None], 0.0)

    def parameter_groups(self) -> list[ParameterGroup]:
        named, config = dict(self.named_parameters()), self.config
        groups = []
        if config.gates is not None:
            groups.append(ParameterGroup("gates", [named.pop("gate")], config.gates.multiplier))
        where, what = self._step_factors
        parts = (("queries_keys", ("query", "key"), where),
                ("queries_keys_terms", ("query_bias", "key_bias", "bos_key"), where * config.terms_multiplier),
                ("terms", ("bos_score", "bos_value", "decoder_bias", "phase"), config.terms_multiplier),
                ("out", ("out",), what))  # fmt: skip
        for name, members, multiplier in parts:
            groups.append(ParameterGroup(name, [named.pop(m) for m in members if m in named], multiplier))
        return [*groups, ParameterGroup("maps", list(named.values()), 1.0)]

    @property
    def _step_factors(self) -> tuple[float, float]:
        """Learning rates of queries and keys, and of outputs, so that a step moves as much whatever heads there are.

        1 for as many heads of the base layer's width as it has. Adam moves entries alike: scores, sums of e products
        over sqrt(e), by sqrt(e); what is written by as much as columns bring together. Combined layers, where few of
        either are active, are left alone.
        """
        config, dims = self.config, self.dims
        if isinstance(config.variant, Combined):
            return 1.0, 1.0
        columns = config.variant.active if isinstance(config.variant, RankOne) else len(self.out)
        return (dims.head_dim / config.head_dim) ** 0.5, min(1.0, dims.n_heads * dims.head_dim / columns)

    @torch.no_grad()
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        start_replacement_(self, batches, generator)

    def calibrate_(self, batches: Sequence[Batch]) -> None:
        if isinstance(self.config.variant, Combined):
            rows = [(self.inputs(b).flatten(0, 1), b.mask.flatten()) for b in batches]
            with torch.no_grad():
                self.encoder.calibrate_(rows, self.out.norm(dim=1), self.engine)


def _strongest(x: Float[Tensor, "B G T E"], k: int) -> Float[Tensor, "B G T E"]:
    """Positive parts of the k largest entries of every row."""
    if k < x.shape[-1]:
        kept = torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.detach().topk(k, dim=-1, sorted=False).indices, True)
        x = x * kept
    return x.relu()


def _rise(progress: float, start: float, share: float) -> float:
    """0 up to ``start``, then linearly up to 1 over ``share``."""
    return float(progress >= start) if share == 0 else min(1.0, max(0.0, (progress - start) / share))
