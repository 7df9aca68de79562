"""The per-position encoder that every dictionary shares: one dense product, then non-zeros only.

Shape legend: N rows (positions), X input width, F features.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from crosshead.dictionaries.sparsity import (
    L1,
    BatchTopK,
    JumpReLU,
    TopK,
    batch_topk_threshold,
    select,
    warm_coefficient,
)
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import Product
from crosshead.maths.scan import largest_entries
from crosshead.maths.sparse import encode

__all__ = ["Activations", "SparseEncoder"]


class Activations(NamedTuple):
    """What an encoder says about a batch."""

    codes: SparseCodes
    """f."""
    pre: SparseCodes
    """Pre-activations at the same entries."""
    sums: Float[Tensor, " F"] | None
    """Sum of every feature's pre-activations over all counted rows; None unless asked for and needed."""


class _Jump(torch.autograd.Function):
    """pre * [pre > theta] and [pre > theta], with rectangle-kernel gradients of width eps for theta."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        on = (pre > theta).to(pre.dtype)
        return pre * on, on

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_value, grad_on = gradients
        pre, theta = ctx.saved_tensors
        kernel = ((pre - theta).abs() < ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        return grad_value * (pre > theta), -kernel * (theta * grad_value + grad_on), None


class SparseEncoder(nn.Module):
    """f = activation(W x + b), as sparse codes.

    Parameters are ``weight`` [F, X], ``bias`` [F] and, for JumpReLU, ``log_threshold`` [F]. The buffer ``threshold``
    is BatchTopK's inference threshold on f_i n_i.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    threshold: Tensor

    def __init__(self, d_in: int, features: int, sparsity: Any):
        super().__init__()
        if isinstance(sparsity, TopK) and sparsity.k > features:
            raise ValueError(f"k={sparsity.k} exceeds features={features}; lower sparsity.k or raise features")
        self.sparsity = sparsity
        self.weight = nn.Parameter(torch.zeros(features, d_in))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("threshold", torch.zeros(()))
        if isinstance(sparsity, JumpReLU):
            self.log_threshold = nn.Parameter(torch.full((features,), -2.0))

    def forward(
        self,
        x: Float[Tensor, "N X"],
        mask: Bool[Tensor, " N"],
        norms: Float[Tensor, " F"],
        progress: float = 1.0,
        engine: Engine | None = None,
        *,
        for_penalties: bool = False,
    ) -> Activations:
        """Activations of the rows in ``mask``; ``norms`` weigh the competition between features.

        ``for_penalties``: with what ``penalties`` needs of all entries, if the sparsity has such a penalty.
        """
        product, engine = Product(x, self.weight, self.bias, mask), engine or Engine()
        threshold = self.threshold
        if isinstance(self.sparsity, JumpReLU):
            # The band just below the threshold is part of the structure: the threshold's gradient lives there.
            threshold = self.log_threshold.exp() - (self.sparsity.bandwidth / 2 if self.training else 0.0)
        structure = select(
            product,
            norms,
            self.sparsity,
            threshold=threshold,
            by_threshold=not self.training,
            progress=progress,
            engine=engine,
        )
        wants_sums = for_penalties and getattr(self.sparsity, "negative_coefficient", 0.0) > 0
        pre, sums = encode(product, structure, engine, with_sums=wants_sums)
        codes = pre
        if isinstance(self.sparsity, JumpReLU):
            theta = self.log_threshold.exp()[pre.columns]
            codes = pre.with_values(_Jump.apply(pre.values, theta, self.sparsity.bandwidth)[0])
        return Activations(codes, pre, sums)

    def penalties(
        self, activations: Activations, norms: Float[Tensor, " F"], n_counted: int, progress: float = 1.0
    ) -> dict[str, Tensor]:
        """Penalty terms of the loss, mean over ``n_counted`` rows; empty for the top-k forms.

        L1: ``sparsity`` = lambda_s sum_i f_i n_i, ``negative`` = lambda_p sum_i relu(-pre_i) n_i (the source).
        JumpReLU: ``sparsity`` = lambda_s sum_i [pre_i > theta_i], ``negative`` = lambda_p sum_i
        relu(theta_i - pre_i) n_i.
        """
        sparsity, (codes, pre, sums) = self.sparsity, activations
        if isinstance(sparsity, TopK):
            return {}
        warm = warm_coefficient(sparsity, progress)
        n_rows = max(n_counted, 1)
        parts: dict[str, Tensor] = {}
        if isinstance(sparsity, L1):
            excess = codes.feature_sums()
            level = 0.0
            parts["sparsity"] = sparsity.coefficient * warm * (excess * norms).sum() / n_rows
        else:
            # Values are pre * [pre > theta]; the count needs its own surrogate gradient through theta.
            theta_F = self.log_threshold.exp()
            theta = theta_F[pre.columns]
            on = _Jump.apply(pre.values, theta, sparsity.bandwidth)[1]
            parts["sparsity"] = sparsity.coefficient * warm * on.sum() / n_rows
            excess = pre.with_values((pre.values - theta).clamp(min=0.0)).feature_sums()
            level = theta_F * n_counted
        if sums is not None:
            # sum_t relu(level - pre) = level N - sum_t pre + sum_t relu(pre - level): exact, and dense in nothing.
            parts["negative"] = sparsity.negative_coefficient * warm * ((level - sums + excess) * norms).sum() / n_rows
        return parts

    @torch.no_grad()
    def folded_state(
        self, mean: Float[Tensor, " X"], scale: Float[Tensor, " X"] | Float[Tensor, ""], norms: Float[Tensor, " F"]
    ) -> dict[str, Tensor]:
        """Weights that give for raw x the pre-activations that this encoder gives for (x - mean) * scale.

        The state of an encoder whose sparsity is ``folded_sparsity`` of this one's; ``norms`` are the n_i that this
        encoder's threshold was calibrated with.
        """
        weight = self.weight.double() * scale.double()
        state = self.state_dict() | {"weight": weight, "bias": self.bias.double() - weight @ mean.double()}
        if isinstance(self.sparsity, BatchTopK):
            # Theta is stored as its logarithm, which must be finite: a threshold of 0 becomes a tiny theta, and a
            # feature that writes nothing (n_i = 0, never chosen) gets a huge one.
            least, most = 1e-37, 1e37
            theta = torch.where(norms > 0, self.threshold.double() / norms.double(), most)
            state["log_threshold"] = theta.clamp(least, most).log()
            state["threshold"] = torch.zeros_like(self.threshold)
        return state

    @torch.no_grad()
    def start_bias_(self, x: Float[Tensor, "n X"]) -> None:
        """Set biases so that every feature is active on the same share of ``x``, and scale to unit rms when active."""
        sparsity = self.sparsity
        l0 = sparsity.k if isinstance(sparsity, TopK) else sparsity.start_l0
        features, n_rows = len(self.weight), len(x)
        active = min(max(round(n_rows * l0 / features), 2), n_rows - 1)
        for first in range(0, features, 1024):
            chunk = slice(first, first + 1024)
            pre = x @ self.weight[chunk].T
            top = pre.topk(active + 1, dim=0).values
            self.bias[chunk] = -top[-1]
            rms = (top[:-1] - top[-1]).square().mean(0).sqrt().clamp(min=1e-6)
            self.weight[chunk] /= rms[:, None]
            self.bias[chunk] /= rms

    @torch.no_grad()
    def calibrate_(
        self, rows: list[tuple[Tensor, Tensor]], norms: Float[Tensor, " F"], engine: Engine | None = None
    ) -> None:
        """Fix BatchTopK's inference threshold so that the mean number of active features over (x, mask) is k."""
        if not isinstance(self.sparsity, BatchTopK):
            return
        scores, wanted = [], 0
        for x, mask in rows:
            count = self.sparsity.k * int(mask.sum())
            best = largest_entries(Product(x, self.weight, self.bias, mask), norms, 2 * count, engine or Engine())
            scores.append(best.values * norms[best.columns])
            wanted += count
        self.threshold.copy_(batch_topk_threshold(scores, wanted))
