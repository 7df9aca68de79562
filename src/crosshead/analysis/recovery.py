"""How much of a planted truth a trained dictionary has found.

Shape legend: n true features (atoms), F found ones, X input width, D output width, M movers or heads.

Every true feature is matched with one found feature, none twice, so that the sum of similarities is largest (Hungarian
algorithm). The similarity is the *smallest* of three cosines, those of encoders, decoders and loadings: a feature is
recovered when all of it is. Decoder and loadings may both be turned round, which changes nothing. Where more features
lie in a space than it has dimensions, the best encoder of one is turned away from its neighbours and need not be the
planted row: there encoders are left out. The loadings of a value SAE are the norms of parts of its decoder, so there
the decoder alone decides. Design choices, for the toy model of attention
superposition of the January 2024 update.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn.functional import normalize

from crosshead.activations.planted import Truth
from crosshead.dictionaries.base import LayerWeights
from crosshead.maths.statistics import participation_ratio

__all__ = [
    "FeatureSet", "Planted", "Recovery", "found_moved", "found_values", "planted_moved", "planted_values", "recovery",
]  # fmt: skip

_RECOVERED = 0.95
_SAME = 0.8
"""Encoder cosine from which a found feature counts as one more reading of a true one."""


class FeatureSet(NamedTuple):
    """Features as three tables; scales and the joint sign of decoder and loadings do not matter."""

    encoder: Float[Tensor, "F X"]
    decoder: Float[Tensor, "F D"]
    loadings: Float[Tensor, "F M"]


class Planted(NamedTuple):
    """The true features that a dictionary can find."""

    features: FeatureSet
    feature: Int[Tensor, " n"]
    """The feature of several OV dimensions that a row is one of."""
    family: Int[Tensor, " n"]
    """The planted family of its loadings."""

    @classmethod
    def of(cls, truth: Truth, features: FeatureSet, kept: Bool[Tensor, " A"]) -> "Planted":
        """The atoms ``kept``."""
        return cls(FeatureSet(*(table[kept] for table in features)), truth.feature[kept], truth.family[kept])


class Recovery(BaseModel):
    """Scores against the truth; medians and means over true features, those without a partner counting 0."""

    n_true: int
    n_found: int
    """Live features of the dictionary."""
    share_recovered: float
    """True features whose smallest cosine with their partner, of those that are compared, is at least 0.95."""
    cosine_encoder: float
    """Median, like the next two."""
    cosine_decoder: float
    cosine_loadings: float
    heads_error: float
    """Mean absolute difference of the movers per feature: participation ratios of squared loadings."""
    ov_dimension_error: float
    """Mean absolute difference of OV dimensions: participation ratio of the squared singular values of the decoder
    rows of a true feature's atoms, and of all live found features whose encoder reads one of them (cosine 0.8)."""
    adjusted_rand: float
    """Agreement of k-means clusters of the partners' loadings with the planted families, 1 at best, 0 by chance."""


def planted_moved(truth: Truth, layer: int = 0) -> Planted:
    """The truth as a dictionary that moves features sees one layer of it."""
    features = FeatureSet(truth.encoder, truth.decoder[layer], truth.loadings[layer].T)
    return Planted.of(truth, features, truth.active[layer])


def found_moved(module: Any) -> FeatureSet:
    """The features of a multitoken transcoder whose input is scaled by one factor (``input: resid``)."""
    return FeatureSet(module.encoder.weight.detach(), module.decoder.detach(), module.effective_loadings().detach().T)


def planted_values(truth: Truth, weights: Mapping[int, LayerWeights], module: Any) -> Planted:
    """The truth as a value SAE of the module's layers sees it, without what only the identity moves.

    An atom's row holds L_hi d_i U_h for every head of every layer, in the module's units; encoder and decoder are one.
    """
    rows, sizes = [], []
    for layer, scale in zip(module.config.layers, module.scales, strict=True):
        moved = truth.loadings[layer][1:, :, None] * truth.decoder[layer]
        values = torch.einsum("had,hed->ahe", moved, weights[layer].W_O) * scale
        rows.append(values.flatten(1))
        sizes.append(values.norm(dim=2))
    table = torch.cat(rows, 1)
    return Planted.of(truth, FeatureSet(table, table, torch.cat(sizes, 1)), table.norm(dim=1) > 0)


def found_values(module: Any) -> FeatureSet:
    """The features of a value SAE."""
    return FeatureSet(module.encoder.weight.detach(), module.decoder.detach(), module.head_loadings())


def recovery(planted: Planted, found: FeatureSet, live: Bool[Tensor, " F"], *, by_encoders: bool = True) -> Recovery:
    """Match the ``live`` ones among ``found`` with what was planted, and score them.

    Without ``by_encoders`` encoders have no say in what matches and what is recovered.
    ValueError where the widths of the two do not fit, or nothing was planted.
    """
    for name, a, b in zip(FeatureSet._fields, planted.features, found, strict=True):
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"the true {name} is {a.shape[1]} wide, the found one {b.shape[1]}; give the dictionary "
                             "the planted cache's dims and layers")  # fmt: skip
    if not len(planted.family):
        raise ValueError("the truth has no features in these layers; plant some")
    live = live & (found.loadings.norm(dim=1) > 0) & (found.decoder.norm(dim=1) > 0)
    true = FeatureSet(*(table.double() for table in planted.features))
    found = FeatureSet(*(table.double()[live] for table in found))
    cosines = [normalize(a, dim=1) @ normalize(b, dim=1).T for a, b in zip(true, found, strict=True)]
    encoder, decoder, loadings = cosines
    sign = torch.where(torch.minimum(decoder, loadings) >= torch.minimum(-decoder, -loadings), 1.0, -1.0)
    smallest = torch.minimum(decoder * sign, loadings * sign)
    smallest = torch.minimum(encoder, smallest) if by_encoders else smallest
    rows, columns = (torch.from_numpy(index) for index in linear_sum_assignment(-smallest.numpy()))

    def matched(table: Tensor) -> Tensor:
        return torch.zeros(len(true.encoder), dtype=torch.float64).index_put((rows,), table[rows, columns])

    return Recovery(
        n_true=len(true.encoder),
        n_found=len(found.encoder),
        share_recovered=float((matched(smallest) >= _RECOVERED).double().mean()),
        cosine_encoder=float(matched(encoder).median()),
        cosine_decoder=float(matched(decoder * sign).median()),
        cosine_loadings=float(matched(loadings * sign).median()),
        heads_error=_heads_error(true.loadings, found.loadings, rows, columns),
        ov_dimension_error=_ov_dimension_error(true.decoder, found.decoder, encoder, planted.feature),
        adjusted_rand=_adjusted_rand(found.loadings[columns], planted.family[rows]),
    )


def _heads_error(true: Tensor, found: Tensor, rows: Tensor, columns: Tensor) -> float:
    """A true feature without a partner counts with all its heads."""
    wanted = participation_ratio(true.square().T)
    got = torch.zeros_like(wanted).index_put((rows,), participation_ratio(found.square().T)[columns])
    return float((wanted - got).abs().mean())


def _ov_dimension_error(
    true: Float[Tensor, "n D"], found: Float[Tensor, "F D"], encoder: Float[Tensor, "n F"], feature: Int[Tensor, " n"]
) -> float:
    """A found feature is a reading of the atom whose encoder is nearest, if that is near."""
    if not len(found):
        return float(np.mean([_effective_rank(true[feature == i]) for i in feature.unique()]))
    nearest = encoder.max(0)
    reads = torch.where(nearest.values >= _SAME, feature[nearest.indices], -1)
    return float(np.mean([abs(_effective_rank(true[feature == i]) - _effective_rank(found[reads == i]))
                          for i in feature.unique()]))  # fmt: skip


def _effective_rank(rows: Float[Tensor, "r D"]) -> float:
    """Directions that unit rows fill: r orthogonal ones r, equal ones 1, none 0."""
    if not len(rows):
        return 0.0
    return float(participation_ratio(torch.linalg.svdvals(normalize(rows, dim=1)).square()[:, None]))


def _adjusted_rand(loadings: Float[Tensor, "n M"], family: Int[Tensor, " n"]) -> float:
    n_families = len(family.unique())
    if n_families < 2:
        return 0.0
    unit = normalize(loadings, dim=1)
    # Products of two entries: a loading vector and its negative are one, also where no entry is clearly the largest.
    vectors = (unit[:, :, None] * unit[:, None, :]).flatten(1).numpy()
    with threadpool_limits(1):
        kmeans = KMeans(n_clusters=n_families, n_init=10, random_state=0)  # pyright: ignore[reportArgumentType]
        labels = kmeans.fit_predict(vectors)
    return float(adjusted_rand_score(family.numpy(), labels))
