"""What moves a dictionary's features, as rows of masses: one row per active feature and anchor position.

Shape legend: B contexts, T positions (t query, s key), F features, M movers, H query heads, E head width, n features
active at one position, w other positions.

- A multitoken transcoder moves f_i(s) by P_i(t, s) and writes P_i(t, s) f_i(s) ||d_i||: anchored at the source s.
- A value SAE's feature is moved by every head that reads it, P_i(t, s) = sum_h ||W_O^h d_i|| A_h(t, s); only layers
  whose pattern is known move anything, and with none of them a feature stays where it is.
- An attention-output SAE reads f_i(t) off the heads' sum, which splits exactly over heads and keys (direct feature
  attribution, after Kissane et al. 2024): a_hi(t, s) = A_h(t, s) v_h(s) . u_hi, u_hi the encoder seen through W_O^h.
  f_i(t) ||d_i|| is shared out over keys in proportion to the positive part of sum_h a_hi(t, s): anchored at t.

No [T, T, F] tensor: one anchor at a time, the features active there only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosshead.dictionaries.base import Batch, Dictionary, LayerWeights, Site
from crosshead.maths.codes import SparseCodes
from crosshead.maths.patterns import expand_kv

__all__ = ["IDENTITY", "Mover", "Moves", "mover_of"]

IDENTITY = (-1, -1)
"""Stands for (layer, head) of the mover that leaves a feature where it is."""


class Moves(NamedTuple):
    """What the features active at one position move, to or from a run of other positions."""

    context: int
    anchor: int
    features: Int[Tensor, " n"]
    values: Float[Tensor, " n"]
    """f_i at the anchor."""
    others: slice
    written: Float[Tensor, "n w"]
    """Size of what is written, times its sign."""
    through: Callable[[Float[Tensor, " w"]], Float[Tensor, "n M"]]
    """Mass through every mover alone, summed over the other positions with weights."""


class Mover(ABC):
    """The rows of one dictionary."""

    anchored: Literal["source", "destination"]
    """What the anchor of a row is; the other positions are destinations or sources."""
    movers: list[tuple[int, int]]
    """(layer, head) of every mover, or IDENTITY."""
    sites: tuple[Site, ...]
    """What a batch must hold."""
    moves_between_positions: bool = True
    """Whether anything but the identity moves features."""

    def __init__(self, module: Any):
        self.module = module
        self.sizes = module.decoder.detach().norm(dim=1)

    @property
    def n_features(self) -> int:
        """F."""
        return self.module.config.features

    @abstractmethod
    def rows(self, batch: Batch, context: int, active: "Active") -> Iterator[Moves]:
        """The rows of one context, by anchor."""

    @torch.no_grad()
    def contexts(self, batch: Batch) -> Iterator[Iterator[Moves]]:
        """The rows of every context of a batch."""
        active = Active.of(self.module.encode(batch))
        for context in range(len(batch.mask)):
            yield self.rows(batch, context, active)


class Active(NamedTuple):
    """The entries of sparse codes that are not zero."""

    offsets: list[int]
    columns: Int[Tensor, " Z"]
    values: Float[Tensor, " Z"]

    @classmethod
    def of(cls, codes: SparseCodes) -> "Active":
        """Codes without the zeros among their stored entries."""
        on = codes.values.detach() != 0
        counts = torch.bincount(codes.rows[on], minlength=codes.n_rows)
        return cls([0, *counts.cumsum(0).tolist()], codes.columns[on], codes.values.detach()[on])

    def at(self, row: int) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Features and values of a row."""
        own = slice(self.offsets[row], self.offsets[row + 1])
        return self.columns[own], self.values[own]


class _BySource(Mover):
    """Features that head patterns move with fixed loadings [F, M]; the identity comes first."""

    anchored = "source"

    def __init__(self, module: Any, loadings: Float[Tensor, "F M"], sizes: Float[Tensor, " F"], layers: list[int]):
        super().__init__(module)
        self.loadings, self.sizes = loadings.detach(), sizes.detach()
        self.patterns = tuple(Site(layer, "pattern") for layer in layers)
        self.movers = [IDENTITY, *((layer, head) for layer in layers for head in range(module.dims.n_heads))]
        self.sites = tuple(dict.fromkeys((*module.sites, *self.patterns)))
        self.moves_between_positions = bool(layers)

    def rows(self, batch: Batch, context: int, active: Active) -> Iterator[Moves]:
        n_positions = batch.mask.shape[1]
        heads = [batch[site][context].to(self.loadings) for site in self.patterns]
        columns = torch.cat(heads).permute(2, 0, 1).contiguous() if heads else None  # [s, heads, t]
        for source in range(n_positions):
            features, values = active.at(context * n_positions + source)
            if not len(features):
                continue
            loadings = self.loadings[features] * (values * self.sizes[features])[:, None]
            if columns is None:
                column = loadings.new_zeros(0, n_positions - source)
            else:
                column = columns[source, :, source:]
            written = loadings[:, 1:] @ column
            written[:, 0] += loadings[:, 0]
            yield Moves(context, source, features, values, slice(source, n_positions), written,
                        _through_loadings(loadings, column))  # fmt: skip


def _through_loadings(loadings: Tensor, column: Tensor) -> Callable[[Tensor], Tensor]:
    def through(weights: Tensor) -> Tensor:
        return loadings.abs() * torch.cat([weights[:1], column @ weights])

    return through


class _ByDestination(Mover):
    """Features read off a sum of head outputs by ``readers``, u_hi."""

    anchored = "destination"

    def __init__(self, module: Any, readers: Float[Tensor, "F H E"]):
        super().__init__(module)
        layer = module.config.layers[0]
        self.readers = readers.detach()
        self.pattern, self.value = Site(layer, "pattern"), Site(layer, "v")
        self.movers = [(layer, head) for head in range(module.dims.n_heads)]
        self.sites = tuple(dict.fromkeys((*module.sites, self.pattern, self.value)))

    def rows(self, batch: Batch, context: int, active: Active) -> Iterator[Moves]:
        n_positions, mask = batch.mask.shape[1], batch.mask[context]
        pattern = batch[self.pattern][context].to(self.readers) * mask
        values_HTE = expand_kv(batch[self.value][context : context + 1].to(self.readers), self.readers.shape[1])[0]
        first, last = (active.offsets[row] for row in (context * n_positions, (context + 1) * n_positions))
        used, places = torch.unique(active.columns[first:last], return_inverse=True)
        read_FHT = torch.einsum("fhe,hte->fht", self.readers[used], values_HTE)
        for destination in range(n_positions):
            features, values = active.at(context * n_positions + destination)
            if not len(features):
                continue
            offset = active.offsets[context * n_positions + destination] - first
            sources = slice(0, destination + 1)
            parts = read_FHT[places[offset : offset + len(features)]][:, :, sources]
            parts = parts * pattern[:, destination, sources]
            size = (values * self.sizes[features])[:, None]
            total = parts.sum(1).clamp(min=0.0)
            size = size * total.any(1, keepdim=True)  # what only the first token pushes up moves nothing
            written = total * (size / total.sum(1, keepdim=True).clamp(min=1e-30))
            yield Moves(context, destination, features, values, sources, written, _through_parts(parts, size))


def _through_parts(parts: Float[Tensor, "n H w"], size: Float[Tensor, "n 1"]) -> Callable[[Tensor], Tensor]:
    def through(weights: Tensor) -> Tensor:
        positive = parts.clamp(min=0.0)
        return (positive @ weights) * (size / positive.sum((1, 2))[:, None].clamp(min=1e-30))

    return through


@torch.no_grad()
def mover_of(
    module: Dictionary, weights: Mapping[int, LayerWeights], has_pattern: Callable[[int], bool] = lambda layer: True
) -> Mover:
    """What moves a dictionary's features. ``has_pattern`` says of which layers a value SAE may ask for the pattern.

    ValueError for an architecture whose features nothing is known to move.
    """
    found: Any = module
    if hasattr(module, "effective_loadings"):
        return _BySource(module, found.effective_loadings().T, found.decoder.norm(dim=1), [found.layer])
    if hasattr(module, "query_head_loadings"):
        layers = [layer for layer in module.config.layers if has_pattern(layer)]
        loadings = found.query_head_loadings(weights).unflatten(1, (len(module.config.layers), -1))
        moved = loadings[:, [module.config.layers.index(layer) for layer in layers]].flatten(1)
        if not layers:  # features stay where they are, at the size of their decoder row
            return _BySource(module, torch.ones_like(found.decoder[:, :1]), found.decoder.norm(dim=1), [])
        ones = torch.ones_like(found.decoder[:, 0])
        return _BySource(module, torch.cat([torch.zeros_like(moved[:, :1]), moved], dim=1), ones, layers)
    if hasattr(module.config, "per_head"):
        return _ByDestination(module, _readers(found, weights))
    raise ValueError(f"nothing is known of what moves the features of the architecture {module.config.kind!r}; "
                     "name runs of an MTC, a value SAE or an attention-output SAE in meaning.runs")  # fmt: skip


def _readers(module: Any, weights: Mapping[int, LayerWeights]) -> Float[Tensor, "F H E"]:
    """u_hi: what a unit of value at a head adds to a feature's pre-activation when it arrives with attention 1."""
    encoder = module.encoder.weight * module.column_scales
    if module.config.per_head:
        return encoder.unflatten(1, (module.dims.n_heads, module.dims.head_dim))
    return torch.einsum("fd,hed->fhe", encoder, weights[module.config.layers[0]].W_O.to(encoder))
