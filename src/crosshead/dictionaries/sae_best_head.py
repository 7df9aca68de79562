"""A residual-stream SAE whose features reach the attention output through their best head, context by context.

After Jermyn et al., Progress on Attention (2025), a baseline for QK/OV coupling: the SAE (``coupled``) is trained to
reconstruct the layer's input and knows nothing of attention. Then, in every context, each feature is carried by the one
head that moves it most,

    h_i = argmax_h sum_t || m_hi sum_s A_h(t,s) f_i(s) ||,        m_hi = S_i V_h W_O^h
    y_t = b + sum_h A_h(t,BOS) c_h + sum_i a_{h_i} m_{h_i i} sum_s A_{h_i}(t,s) f_i(s)

with S_i the SAE's decoder row. Attention mass alone is no movement: a head may look at a feature and write nothing of
it. The identity is no choice. The comparison favours the MTC by one head less here, and the SAE by a choice that is
made anew for every context, with all of it in sight: what y says at t may depend on later tokens.

Design choices: V_h is a ridge map from the input to the values of h's key/value head, because caches hold values and
not W_V. ``calibrate_`` fits one gain a_h per head together with b and c_h by least squares on training contexts, with
activations as at inference; a gain makes up for what the other heads would have moved of the features that chose h.
Nothing of this is trained by gradients: ``loss`` is the SAE's own, and so is the normalised MSE that training logs.

Shape legend: B contexts, T positions, N = B*T rows, F features, Z non-zeros, H query heads, K key/value heads, E head
width, D = d_model.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosshead.dictionaries.base import Batch, DictionaryConfig, LayerWeights, Loss, ModelDims, ParameterGroup, Site
from crosshead.dictionaries.coupled import Coupled
from crosshead.dictionaries.sparsity import Sparsity, folded_sparsity
from crosshead.dictionaries.starts import value_map
from crosshead.maths.codes import SparseCodes
from crosshead.maths.sparse import decode

__all__ = ["Config", "Module"]


class Config(DictionaryConfig):
    """Parameters of a residual-stream SAE that is carried by its best heads."""

    kind: Literal["sae_best_head"] = "sae_best_head"  # pyright: ignore[reportIncompatibleVariableOverride]
    layers: tuple[int]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The one layer whose input it reconstructs and whose attention carries it."""
    sparsity: Sparsity
    """Which features are active."""
    target: Literal["attn_out"] = "attn_out"
    """What the carried features predict: the attention output."""
    input: Literal["normed", "resid"] = "normed"
    """Read the residual stream divided by its rms at every position, or scaled by one factor for all."""


class Module(Coupled):
    """A residual-stream SAE through its best heads; see the module's text for its equations."""

    Config = Config
    to_value: Tensor
    W_O: Tensor
    gains: Tensor
    bos: Tensor
    bias: Tensor

    def __init__(self, config: Config, dims: ModelDims):
        super().__init__(config, dims)
        self.register_buffer("to_value", torch.zeros(dims.d_model, dims.n_kv_heads, dims.head_dim))
        self.register_buffer("W_O", torch.zeros(dims.n_heads, dims.head_dim, dims.d_model))
        self.register_buffer("gains", torch.ones(dims.n_heads))
        self.register_buffer("bos", torch.zeros(dims.n_heads, dims.d_model))
        self.register_buffer("bias", torch.zeros(dims.d_model))

    # ---- the SAE ----

    def loss(self, batch: Batch, progress: float = 1.0) -> Loss:
        """The SAE's loss: ``reconstruction`` and ``normalised_mse`` are of its input, not of the attention output."""
        sae = self.sae_step(batch, progress)
        parts = {"reconstruction": sae.error / len(sae.inputs)} | sae.penalties
        return Loss.of(parts, sae.codes, sae.error, sae.inputs)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("all", list(self.parameters()), 1.0)]

    # ---- carried by heads ----

    def values(self) -> Float[Tensor, "H F E"]:
        """What every feature's decoder row is as a value of every head, before W_O."""
        values = torch.einsum("fd,dke->kfe", self.sae_decoder.detach(), self.to_value)
        return values.repeat_interleave(self.dims.n_heads // self.dims.n_kv_heads, dim=0)

    def movements(self, codes: SparseCodes, batch: Batch) -> Float[Tensor, "B H F"]:
        """sum_t ||m_hi sum_s A_h(t,s) f_i(s)|| over counted t, without the target's scale.

        Activations and patterns have no negative entries, so this is ||m_hi|| sum_s f_i(s) sum_t A_h(t,s).
        """
        sizes_HF = torch.stack([(v @ w_o).norm(dim=1) for v, w_o in zip(self.values(), self.W_O, strict=True)])
        pattern = batch[Site(self.layer, "pattern")].to(self.W_O.dtype)
        received_BTH = (pattern * batch.mask[:, None, :, None]).sum(2).transpose(1, 2)
        n_contexts, n_positions = batch.mask.shape
        place = codes.rows // n_positions * codes.n_features + codes.columns
        moved_ZH = received_BTH.flatten(0, 1)[codes.rows] * codes.values.detach()[:, None]
        moved = moved_ZH.new_zeros(n_contexts * codes.n_features, self.dims.n_heads).index_add_(0, place, moved_ZH)
        return moved.view(n_contexts, codes.n_features, -1).transpose(1, 2) * sizes_HF

    def best_heads(self, codes: SparseCodes, batch: Batch) -> Int[Tensor, "B F"]:
        """The head that carries each feature in each context; 0 where the feature is silent."""
        return self.movements(codes, batch).argmax(dim=1)

    def carried(self, codes: SparseCodes, batch: Batch) -> list[Float[Tensor, "B T D"]]:
        """What every head writes of the features that it carries, with gain 1, in normalised units."""
        best_BF = self.best_heads(codes, batch)
        carrier_Z = best_BF[codes.rows // batch.mask.shape[1], codes.columns]
        pattern = batch[Site(self.layer, "pattern")].to(self.W_O.dtype)
        written = []
        for h, values_FE in enumerate(self.values()):
            own = codes.with_values(codes.values * (carrier_Z == h))
            moved = pattern[:, h] @ decode(own, values_FE, self.engine).view(*batch.mask.shape, -1)
            written.append(moved @ self.W_O[h] * self.target_scale)
        return written

    def decode(self, codes: SparseCodes, batch: Batch) -> Float[Tensor, "B T D"]:
        first_BTH = batch[Site(self.layer, "pattern")][..., 0].transpose(1, 2).to(self.bos.dtype)
        y = first_BTH @ self.bos + self.bias
        for gain, written in zip(self.gains, self.carried(codes, batch), strict=True):
            y = y + gain * written
        return y

    # ---- start, calibration, export ----

    @torch.no_grad()
    def start_(self, batches: Sequence[Batch], weights: Mapping[int, LayerWeights], generator: torch.Generator) -> None:
        x = self.start_units_(batches)
        self.to_value.copy_(value_map(x, batches, Site(self.layer, "v")))
        self.W_O.copy_(weights[self.layer].W_O)
        self.start_sae_(x, batches[0], generator)
        self._fit_gains(batches[: max(1, len(batches) // 4)])

    @torch.no_grad()
    def calibrate_(self, batches: Sequence[Batch]) -> None:
        super().calibrate_(batches)
        mode = self.training
        self.eval()
        self._fit_gains(batches)
        self.train(mode)

    def _fit_gains(self, batches: Sequence[Batch]) -> None:
        """Least squares for a_h, c_h and b together; a head that carries nothing keeps the gain 1.

        With Z the pattern's first column and a one, the gains are the least squares of what Z leaves of the target on
        what Z leaves of the carried outputs.
        """
        n_heads, width = self.W_O.shape[0], self.W_O.shape[2]
        ZZ = self.W_O.new_zeros(n_heads + 1, n_heads + 1, dtype=torch.float64)
        ZU = ZZ.new_zeros(n_heads + 1, n_heads + 1, width)  # against every head's output and, last, the target
        UU = ZZ.new_zeros(n_heads + 1, n_heads + 1)
        for b in batches:
            first = b[Site(self.layer, "pattern")][..., 0].transpose(1, 2)[b.mask].double()
            design = torch.cat([first, torch.ones_like(first[:, :1])], dim=1)
            outputs = torch.stack([u[b.mask] for u in (*self.carried(self.encode(b), b), self.target(b))]).double()
            ZZ += design.T @ design
            ZU += torch.einsum("nz,und->zud", design, outputs)
            UU += outputs.flatten(1) @ outputs.flatten(1).T
        ZZ.diagonal().add_(1e-6 * ZZ.diagonal().mean() + 1e-12)
        on_design = torch.linalg.solve(ZZ, ZU.flatten(1)).view_as(ZU)
        left = UU - torch.einsum("zud,zwd->uw", ZU, on_design)
        gram, moment = left[:-1, :-1], left[:-1, -1]
        pull = 1e-6 * gram.diagonal().mean() + 1e-12
        gram.diagonal().add_(pull)
        gains = torch.linalg.solve(gram, moment + pull)
        solution = on_design[:, -1] - torch.einsum("zud,u->zd", on_design[:, :-1], gains)
        self.gains.copy_(gains)
        self.bos.copy_(solution[:-1])
        self.bias.copy_(solution[-1])

    @torch.no_grad()
    def folded(self) -> "Module":
        """See ``Dictionary.folded``. With ``input: normed`` the division by every rms stays: it is no linear map."""
        config = self.config.model_copy(update={"sparsity": folded_sparsity(self.config.sparsity)})
        folded = type(self)(config, self.dims).to(self.sae_decoder)
        scale = self.target_scale.double()
        folded.load_state_dict(self.state_dict() | self.folded_sae() | self.trivial_units() | {
            "to_value": self.to_value.double() * self.input_scale.double(),
            "bos": self.bos.double() / scale,
            "bias": self.bias.double() / scale + self.target_mean.double(),
        })  # fmt: skip
        folded.engine = self.engine
        return folded.eval()

    # ---- features as users look at them ----

    def head_loadings(self) -> None:
        """None: a feature's head is another one in another context."""
        return None

    @torch.no_grad()
    def pattern(self, batch: Batch, feature: int) -> Float[Tensor, "B T T"]:
        """P_i(t, s) of one feature: in every context its head's pattern times the gain, zero at the first token."""
        best = self.best_heads(self.encode(batch), batch)[:, feature]
        heads = batch[Site(self.layer, "pattern")].to(self.gains.dtype)
        pattern = heads[torch.arange(len(best), device=best.device), best] * self.gains[best][:, None, None]
        return pattern * batch.mask[:, None, :]
