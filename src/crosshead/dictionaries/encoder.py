"""The per-position encoder that every dictionary shares: one dense product, then non-zeros only.

Shape legend: N rows (positions), X input width, F features.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from crosshead.dictionaries.sparsity import (
    L1,
    BatchTopK,
    JumpReLU,
    TopK,
    batch_topk_threshold,
    select,
    warm_coefficient,
)
from crosshead.maths.sparse import SparseCodes, gather_preactivations, preactivation_sums

__all__ = ["SparseEncoder"]


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
    ) -> SparseCodes:
        """Codes of the rows in ``mask``; ``norms`` weigh the competition between features."""
        with torch.no_grad():
            dense = functional.linear(x, self.weight, self.bias)
        threshold = self.threshold
        if isinstance(self.sparsity, JumpReLU):
            # The band just below the threshold is part of the structure: the threshold's gradient lives there.
            threshold = self.log_threshold.exp() - (self.sparsity.bandwidth / 2 if self.training else 0.0)
        structure = select(
            dense,
            norms,
            mask,
            self.sparsity,
            threshold=threshold,
            by_threshold=not self.training,
            progress=progress,
        )
        codes = gather_preactivations(x, self.weight, self.bias, dense, structure)
        if isinstance(self.sparsity, JumpReLU):
            theta = self.log_threshold.exp()[codes.columns]
            codes = codes.with_values(_Jump.apply(codes.values, theta, self.sparsity.bandwidth)[0])
        return codes

    def penalties(
        self,
        codes: SparseCodes,
        x: Float[Tensor, "N X"],
        mask: Bool[Tensor, " N"],
        norms: Float[Tensor, " F"],
        progress: float = 1.0,
    ) -> dict[str, Tensor]:
        """Penalty terms of the loss, mean over counted rows; empty for the top-k forms.

        L1: ``sparsity`` = lambda_s sum_i f_i n_i, ``negative`` = lambda_p sum_i relu(-pre_i) n_i (the source).
        JumpReLU: ``sparsity`` = lambda_s sum_i [pre_i > theta_i], ``negative`` = lambda_p sum_i
        relu(theta_i - pre_i) n_i.
        """
        sparsity = self.sparsity
        if isinstance(sparsity, TopK):
            return {}
        n_counted = mask.sum().clamp(min=1)
        warm = warm_coefficient(sparsity, progress)
        parts: dict[str, Tensor] = {}
        if isinstance(sparsity, L1):
            sums = codes.feature_sums()
            parts["sparsity"] = sparsity.coefficient * warm * (sums * norms).sum() / n_counted
            excess = sums
            level = 0.0
        else:
            # Values are pre * [pre > theta]; the count needs its own surrogate gradient through theta.
            theta_F = self.log_threshold.exp()
            pre = gather_preactivations(x, self.weight, self.bias, self._dense(x), codes).values
            on = _Jump.apply(pre, theta_F[codes.columns], sparsity.bandwidth)[1]
            parts["sparsity"] = sparsity.coefficient * warm * on.sum() / n_counted
            above = (pre - theta_F[codes.columns]).clamp(min=0.0)
            excess = codes.with_values(above).feature_sums()
            level = theta_F * n_counted
        if sparsity.negative_coefficient:
            # sum_t relu(level - pre) = level N - sum_t pre + sum_t relu(pre - level): exact, and dense in nothing.
            shortfall = level - preactivation_sums(x, self.weight, self.bias, mask) + excess
            parts["negative"] = sparsity.negative_coefficient * warm * (shortfall * norms).sum() / n_counted
        return parts

    @torch.no_grad()
    def _dense(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

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
    def calibrate_(self, rows: list[tuple[Tensor, Tensor]], norms: Float[Tensor, " F"]) -> None:
        """Fix BatchTopK's inference threshold so that the mean number of active features over (x, mask) is k."""
        if not isinstance(self.sparsity, BatchTopK):
            return
        scores, wanted = [], 0
        for x, mask in rows:
            count = self.sparsity.k * int(mask.sum())
            batch = (self._dense(x)[mask] * norms).flatten()
            batch = batch[batch > 0]
            scores.append(batch.topk(min(len(batch), 2 * count), sorted=False).values)
            wanted += count
        self.threshold.copy_(batch_topk_threshold(scores, wanted))
