"""Reference points for every frontier on a layer's attention output: what needs no dictionary at all.

Shape legend: B contexts, T positions, n counted rows, H query heads, E head width, D = d_model.

Linear Top-1: the attention output is exactly sum_h A_h v_h W_O^h, so writing each head's moved output in its own
principal axes and keeping the R strongest axes over all heads is a Top-1 multitoken transcoder with linear features
that are active at every position: its L0 is R. A dictionary that is no better has found no sparsity (design choice).

Beside it: the beginning-of-text term and the mean alone; the best linear map of the position's own residual stream; and
the truncated SVD of the targets, which sees the answer (its rank is an L0 on the query side, not the key side).
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crosshead.dictionaries.base import Batch, LayerWeights, Site
from crosshead.dictionaries.starts import ridge
from crosshead.maths.patterns import expand_kv

__all__ = ["ReferenceConfig", "attention_references", "reference_sites"]


class ReferenceConfig(BaseModel):
    """Parameters of the reference stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: tuple[Annotated[int, Field(gt=0)], ...] = (15, 30, 60, 100, 140, 190, 240, 300)
    """R: number of linear features kept."""
    train_contexts: Annotated[int, Field(gt=0)] = 64
    """Training contexts that the principal axes, means and linear maps are fitted on."""


def reference_sites(layer: int) -> tuple[Site, ...]:
    """Sites that a batch must hold for ``attention_references``."""
    return (Site(layer, "resid_in"), Site(layer, "pattern"), Site(layer, "v"), Site(layer, "attn_out"))


class _Rows:
    """Per-head moved outputs without the beginning-of-text key, that key's exact contribution, inputs and targets."""

    def __init__(self, batch: Batch, layer: int, weights: LayerWeights):
        pattern = batch[Site(layer, "pattern")]
        values = expand_kv(batch[Site(layer, "v")].float(), pattern.shape[1])
        mask = batch.mask
        z = pattern[..., 1:] @ values[:, :, 1:]
        first = pattern[..., :1] * values[:, :, :1]
        self.heads_nHE: Tensor = z.transpose(1, 2)[mask]
        self.bos: Tensor = torch.einsum("nhe,hed->nd", first.transpose(1, 2)[mask], weights.W_O)
        x = batch[Site(layer, "resid_in")].float()
        self.x: Tensor = (x / x.square().mean(-1, keepdim=True).sqrt())[mask]
        self.y: Tensor = batch[Site(layer, "attn_out")].float()[mask]


@torch.no_grad()
def attention_references(
    train: Sequence[Batch], heldout: Iterable[Batch], layer: int, weights: LayerWeights, config: ReferenceConfig
) -> dict:
    """Normalised MSE of every reference on held-out contexts, fitted on training contexts.

    Returns ``{layer, target, n_tokens, n_train_tokens, linear_top1: [{rank, l0, normalised_mse}], svd: [...],
    bos_only, own_position_linear}``.
    """
    fitted = _Fit([_Rows(b, layer, weights) for b in train], weights, config.ranks)
    squared: dict[str, float] = {}
    variance, n_tokens = 0.0, 0
    for batch in heldout:
        rows = _Rows(batch, layer, weights)
        for name, prediction in fitted.predictions(rows):
            squared[name] = squared.get(name, 0.0) + float((rows.y - prediction).double().square().sum())
        variance += float((rows.y - fitted.mean).double().square().sum())
        n_tokens += len(rows.y)
    nmse = {name: value / variance for name, value in squared.items()}
    return {
        "layer": layer,
        "target": "attn_out",
        "n_tokens": n_tokens,
        "n_train_tokens": fitted.n_rows,
        "bos_only": nmse["bos"],
        "own_position_linear": nmse["own"],
        "linear_top1": [{"rank": r, "l0": r, "normalised_mse": nmse[f"linear/{r}"]} for r in fitted.ranks],
        "svd": [{"rank": r, "normalised_mse": nmse[f"svd/{r}"]} for r in fitted.ranks],
    }


class _Fit:
    def __init__(self, rows: list[_Rows], weights: LayerWeights, ranks: Sequence[int]):
        heads = torch.cat([r.heads_nHE for r in rows])
        x, y = torch.cat([r.x for r in rows]), torch.cat([r.y for r in rows])
        bos = torch.cat([r.bos for r in rows])
        n_heads, width = heads.shape[1:]
        self.ranks = [r for r in ranks if r <= n_heads * width]
        self.n_rows, self.mean = len(y), y.mean(0)
        self.bos_mean = bos.mean(0)
        self.x_mean = x.mean(0)
        self.own = ridge(x - self.x_mean, y - self.mean)
        self.W_O = weights.W_O
        self.head_mean = heads.mean(0)
        self.axes_HED, energy_HE = self._principal_axes(heads)
        order = energy_HE.flatten().argsort(descending=True)
        self.order = order
        self.basis = torch.linalg.eigh((y - self.mean).double().T @ (y - self.mean).double())[1].flip(1).float()

    def _principal_axes(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Orthonormal axes of each head's written output (rows), strongest first, and their energies."""
        axes, energies = [], []
        for h in range(heads.shape[1]):
            written = (heads[:, h] - self.head_mean[h]) @ self.W_O[h]
            values, vectors = torch.linalg.eigh(written.double().T @ written.double())
            axes.append(vectors.flip(1)[:, : heads.shape[2]].T.float())
            energies.append(values.flip(0)[: heads.shape[2]].float())
        return torch.stack(axes), torch.stack(energies)

    def predictions(self, rows: _Rows) -> Iterable[tuple[str, Float[Tensor, "n D"]]]:
        """Named predictions of the targets of ``rows``."""
        base = self.mean - self.bos_mean + rows.bos
        yield "bos", base
        yield "own", self.mean + (rows.x - self.x_mean) @ self.own
        for rank in self.ranks:
            basis = self.basis[:, :rank]
            yield f"svd/{rank}", self.mean + (rows.y - self.mean) @ basis @ basis.T
        written = torch.einsum("nhe,hed->nhd", rows.heads_nHE - self.head_mean, self.W_O)
        coordinates = torch.einsum("nhd,hed->nhe", written, self.axes_HED).flatten(1)
        axes = self.axes_HED.flatten(0, 1)
        for rank in self.ranks:
            kept = self.order[:rank]
            yield f"linear/{rank}", base + coordinates[:, kept] @ axes[kept]
