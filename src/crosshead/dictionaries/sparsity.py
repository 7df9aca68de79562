"""Which features are active: L1, TopK, BatchTopK and JumpReLU, each with its own parameters.

Shape legend: F features. Scores are pre-activations times the size n_i of what a feature writes, so that no
feature is favoured by shrinking its encoder and growing its decoder.
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import Product
from crosshead.maths.scan import larger_entries, largest_entries, largest_per_row

__all__ = [
    "L1",
    "BatchTopK",
    "JumpReLU",
    "Sparsity",
    "TopK",
    "annealed_k",
    "batch_topk_threshold",
    "folded_sparsity",
    "select",
    "warm_coefficient",
]


class _Sparsity(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class L1(_Sparsity):
    """ReLU with an L1 penalty, and a second one on negative pre-activations that keeps features alive (the source)."""

    kind: Literal["l1"] = "l1"
    coefficient: Annotated[float, Field(ge=0)]
    """lambda_s, on sum_i f_i n_i."""
    negative_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """lambda_p, on sum_i relu(-pre_i) n_i."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The coefficient rises linearly from 0 over this share of training."""
    start_l0: Annotated[float, Field(gt=0)] = 200.0
    """Mean active features per position that the start aims at."""


class TopK(_Sparsity):
    """The k largest scores of every position (Makhzani and Frey 2013; Gao et al. 2024)."""

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(gt=0)]
    """Active features per position."""
    anneal_from: Annotated[float, Field(ge=1)] = 4.0
    """Training starts with this multiple of k."""
    anneal_fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of training over which the multiple falls to 1."""


class BatchTopK(TopK):
    """The k * rows largest scores of a batch; a fixed threshold at inference (Bussmann et al. 2024)."""

    kind: Literal["batch_topk"] = "batch_topk"  # pyright: ignore[reportIncompatibleVariableOverride]


class JumpReLU(_Sparsity):
    """pre * [pre > theta] with a learned theta, rectangle-kernel surrogate gradient (Rajamanoharan et al. 2024)."""

    kind: Literal["jumprelu"] = "jumprelu"
    coefficient: Annotated[float, Field(ge=0)]
    """On the number of active features, sum_i [pre_i > theta_i]."""
    negative_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """On sum_i relu(theta_i - pre_i) n_i."""
    bandwidth: Annotated[float, Field(gt=0)] = 0.1
    """eps, width of the surrogate gradient's kernel, in units of a feature's root mean square when active."""
    warmup_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The coefficient rises linearly from 0 over this share of training."""
    start_l0: Annotated[float, Field(gt=0)] = 200.0
    """Mean active features per position that the start aims at."""


Sparsity = Annotated[L1 | TopK | BatchTopK | JumpReLU, Field(discriminator="kind")]


def folded_sparsity(sparsity: Any) -> Any:
    """The form that selects alike at inference when the decoder changes units: BatchTopK becomes JumpReLU."""
    if isinstance(sparsity, BatchTopK):
        return JumpReLU(coefficient=0.0, start_l0=float(sparsity.k))
    return sparsity


def annealed_k(sparsity: TopK, progress: float) -> float:
    """K now: from ``anneal_from`` times k down to k, linearly over the first ``anneal_fraction`` of training."""
    if sparsity.anneal_fraction == 0:
        return float(sparsity.k)
    share = min(1.0, progress / sparsity.anneal_fraction)
    return sparsity.k * (sparsity.anneal_from + (1.0 - sparsity.anneal_from) * share)


def warm_coefficient(sparsity: L1 | JumpReLU, progress: float) -> float:
    """Share of the penalty coefficients that applies now."""
    return 1.0 if sparsity.warmup_fraction == 0 else min(1.0, progress / sparsity.warmup_fraction)


@torch.no_grad()
def select(
    product: Product,
    norms: Float[Tensor, " F"],
    sparsity: Any,
    *,
    threshold: Float[Tensor, ""] | Float[Tensor, " F"],
    by_threshold: bool,
    progress: float = 1.0,
    engine: Engine,
) -> SparseCodes:
    """The active entries of an encoder's product, with their pre-activations outside autograd.

    ``by_threshold`` is inference: BatchTopK keeps scores above its calibrated ``threshold``. JumpReLU always uses
    ``threshold`` [F] on pre-activations.
    """
    if isinstance(sparsity, JumpReLU):
        return larger_entries(product, torch.ones_like(norms), threshold, engine)
    if isinstance(sparsity, L1):
        return larger_entries(product, torch.ones_like(norms), torch.zeros_like(norms), engine)
    if isinstance(sparsity, BatchTopK) and by_threshold:
        return larger_entries(product, norms, threshold.expand_as(norms).contiguous(), engine)
    k = annealed_k(sparsity, 1.0 if by_threshold else progress)
    if isinstance(sparsity, BatchTopK):
        return largest_entries(product, norms, round(k * int(product.mask.sum())), engine)
    return largest_per_row(product, norms, round(k), engine)


@torch.no_grad()
def batch_topk_threshold(scores_per_batch: list[Float[Tensor, " n"]], count: int) -> Float[Tensor, ""]:
    """The score that exactly ``count`` of all given scores exceed (0 if fewer are positive)."""
    scores = torch.cat(scores_per_batch)
    if count >= len(scores):
        return scores.new_zeros(())
    return scores.kthvalue(len(scores) - count).values.clamp(min=0.0)
