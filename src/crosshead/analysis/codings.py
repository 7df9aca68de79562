"""How each architecture's reconstruction is written as activations and attended positions.

Shape legend: B contexts, T positions, N = B*T rows, U units, W coordinates of a unit, G patterns, D = d_model.

Coordinates are what units write in orthonormal axes of their own, so that a step of delta is an error of the same
length whatever the unit: of a feature f_i n_i, of a plain replacement head z_j in the principal axes of W_O,j.

Values at the query (plain and rank-1 replacement layers): the receiver is told what a head writes and which keys it was
moved from; as many keys are named as give nearly the same by themselves. Values at the key (transcoders, combined
replacement layers): the receiver is told every feature where it is read, the keys that patterns name, and their
weights. Sparse autoencoders of the attention output say nothing about where.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from crosshead.analysis.replacement_metrics import each_pattern
from crosshead.attention.replacement import Module as Replacement
from crosshead.attention.replacement_config import Combined
from crosshead.dictionaries.base import Batch, Site, Trainable
from crosshead.dictionaries.moving import Moving
from crosshead.maths.codes import SparseCodes

__all__ = ["Coded", "coded"]

_PATTERNS_AT_A_TIME = 4


class Coded(ABC):
    """A model seen as a sender of coordinates and patterns."""

    has_positions = True
    weights_of_keys = False
    """Whether the weights of named keys are sent as well."""
    n_patterns = 0

    def __init__(self, module: Any):
        self.module = module

    def target(self, batch: Batch) -> Float[Tensor, "B T D"]:
        """What is reconstructed, in normalised units."""
        return self.module.target(batch)

    @abstractmethod
    def coordinates(self, batch: Batch) -> Float[Tensor, "N U W"]:
        """What every unit writes, in its own orthonormal axes."""

    @abstractmethod
    def predict(self, coordinates: Float[Tensor, "N U W"], batch: Batch, least: float | None) -> Float[Tensor, "B T D"]:
        """The reconstruction; with ``least``, from named keys only (weights rounded to its multiples if sent)."""

    def each_pattern(self, batch: Batch) -> Iterable[tuple[slice, Float[Tensor, "B g T T"]]]:
        """Patterns, a few at a time."""
        raise NotImplementedError(f"{type(self).__name__} has no patterns")

    def patterns_told(self, levels: Int[Tensor, "N U W"], batch: Batch) -> Bool[Tensor, "B G T"]:
        """Rows of patterns that are told: all, or those of units that are active."""
        return torch.ones(len(batch.mask), self.n_patterns, batch.mask.shape[1], dtype=torch.bool,
                          device=batch.mask.device)  # fmt: skip


def coded(module: Trainable) -> Coded:
    """The coding of a model. ValueError for an architecture without one."""
    if isinstance(module, Replacement):
        return _AtKeys(module) if isinstance(module.config.variant, Combined) else _AtQueries(module)
    if isinstance(module, Moving):
        return _Transcoder(module)
    if getattr(module, "head_loadings", None) is not None and module.config.kind == "attn_out_sae":
        return _Autoencoder(module)
    raise ValueError(f"no description length is defined for {module.config.kind!r}; name replacement layers, "
                     "multitoken transcoders or attention output SAEs")  # fmt: skip


class _AtQueries(Coded):
    """Plain and rank-1 replacement heads."""

    def __init__(self, module: Replacement):
        super().__init__(module)
        self.n_patterns = module.config.groups
        out = module.out.unflatten(0, (module.config.features, -1)).double()
        # W_O,j = U S V': z_j U S are coordinates of what is written in the orthonormal rows of V'.
        left, sizes, right = torch.linalg.svd(out, full_matrices=False)
        self.axes = (left * sizes[:, None]).float()
        self.directions = right.float()

    def coordinates(self, batch: Batch) -> Float[Tensor, "N U W"]:
        return self._coordinates(self.module.encode(batch))

    def _coordinates(self, z_NC: Tensor) -> Float[Tensor, "N U W"]:
        return torch.einsum("nuw,uwv->nuv", z_NC.unflatten(1, (len(self.axes), -1)), self.axes)

    def predict(self, coordinates: Tensor, batch: Batch, least: float | None) -> Float[Tensor, "B T D"]:
        if least is not None:
            # What is sent stands at the query; named keys are enough when they give nearly the same by themselves.
            lost = self._coordinates(self.module.encode(batch) - self._from_named(batch, least))
            coordinates = coordinates - lost * (coordinates != 0)
        written = torch.einsum("nuv,uvd->nd", coordinates, self.directions) + self.module.decoder_bias
        return written.view(*batch.mask.shape, -1)

    def _from_named(self, batch: Batch, least: float) -> Float[Tensor, "N C"]:
        """Columns as ``encode`` gives them, moved from named keys only."""
        module = self.module
        v, whole = module.values(batch)[0], module.encode(batch)
        parts = [(pattern * ((pattern / least).round() > 0)) @ v[:, groups]
                 for groups, pattern in each_pattern(module, batch)]  # fmt: skip
        z = torch.cat(parts, 1).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        if module.config.gates is not None:
            z = z * module.column_gates
        return z * (whole != 0)

    def each_pattern(self, batch: Batch) -> Iterable[tuple[slice, Float[Tensor, "B g T T"]]]:
        return each_pattern(self.module, batch)

    def patterns_told(self, levels: Int[Tensor, "N U W"], batch: Batch) -> Bool[Tensor, "B G T"]:
        active = (levels != 0).any(-1).view(len(levels), self.n_patterns, -1).any(-1)
        return active.view(*batch.mask.shape, -1).transpose(1, 2)


class _AtKeys(Coded):
    """Combined replacement layers: sparse features at keys, moved by the layer's own patterns."""

    weights_of_keys = True

    def __init__(self, module: Replacement):
        super().__init__(module)
        self.n_patterns = module.config.groups
        self.norms = module.out.norm(dim=1).clamp(min=1e-12)

    def coordinates(self, batch: Batch) -> Float[Tensor, "N U W"]:
        codes = self.module.encoder(
            self.module.inputs(batch).flatten(0, 1), batch.mask.flatten(), self.module.out.norm(dim=1),
            engine=self.module.engine,
        ).codes.to_dense()  # fmt: skip
        return (codes * self.norms)[..., None]

    def predict(self, coordinates: Tensor, batch: Batch, least: float | None) -> Float[Tensor, "B T D"]:
        module = self.module
        v_BTC = (coordinates[..., 0] / self.norms).view(*batch.mask.shape, -1)
        v_BTC = torch.cat([module.bos_value.expand(len(v_BTC), 1, -1), v_BTC[:, 1:]], 1)
        v = v_BTC.unflatten(-1, (self.n_patterns, -1)).transpose(1, 2)
        parts = [_rounded(pattern, least) @ v[:, groups] for groups, pattern in each_pattern(module, batch)]
        z = torch.cat(parts, 1).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
        return module.decode(module.gated(z), batch)

    def each_pattern(self, batch: Batch) -> Iterable[tuple[slice, Float[Tensor, "B g T T"]]]:
        return each_pattern(self.module, batch)


class _Transcoder(Coded):
    """Dictionaries that move features by the base layer's own patterns."""

    weights_of_keys = True

    def __init__(self, module: Moving):
        super().__init__(module)
        self.n_patterns = module.dims.n_heads
        self.norms = module.feature_norms().clamp(min=1e-12)

    def coordinates(self, batch: Batch) -> Float[Tensor, "N U W"]:
        return (self.module.encode(batch).to_dense() * self.norms)[..., None]

    def predict(self, coordinates: Tensor, batch: Batch, least: float | None) -> Float[Tensor, "B T D"]:
        if least is not None:
            site = Site(self.module.layer, "pattern")
            batch = replace(batch, sites={**batch.sites, site: _rounded(batch[site], least)})
        return self.module.decode(SparseCodes.from_dense(coordinates[..., 0] / self.norms), batch)

    def each_pattern(self, batch: Batch) -> Iterable[tuple[slice, Float[Tensor, "B g T T"]]]:
        pattern = batch[Site(self.module.layer, "pattern")]
        for start in range(0, self.n_patterns, _PATTERNS_AT_A_TIME):
            groups = slice(start, min(start + _PATTERNS_AT_A_TIME, self.n_patterns))
            yield groups, pattern[:, groups]


class _Autoencoder(Coded):
    """Sparse autoencoders of the attention output."""

    has_positions = False

    def __init__(self, module: Any):
        super().__init__(module)
        self.norms = module.feature_norms().clamp(min=1e-12)

    def coordinates(self, batch: Batch) -> Float[Tensor, "N U W"]:
        return (self.module.encode(batch).to_dense() * self.norms)[..., None]

    def predict(self, coordinates: Tensor, batch: Batch, least: float | None) -> Float[Tensor, "B T D"]:
        return self.module.decode(SparseCodes.from_dense(coordinates[..., 0] / self.norms), batch)


def _rounded(pattern: Tensor, least: float | None) -> Tensor:
    return pattern if least is None else (pattern / least).round() * least
