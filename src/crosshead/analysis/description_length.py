r"""Description length: how many bits a position takes, against how much of the attention output they say.

Shape legend: B contexts, T positions, n counted positions, N = B*T rows, U units (features or heads), W coordinates of
a unit (1, or e for plain replacement heads), G patterns. docs/description_length.md defines everything in words.

Both sides know the trained weights. Sent are, per position,

    activations   which units are active: -log2 p_u or -log2 (1 - p_u) for every unit, p_u from training contexts
                  with which values: levels of width delta of what the unit writes, -log2 of a two-sided geometric law
                  around the unit's own median, both from training contexts
    positions     which keys each pattern names: -log2 p or -log2 (1 - p) for every key, p per pattern and octave of
                  distance from training contexts; where values stand at keys, with which weight (a geometric law)

delta is the largest step, in half octaves, that raises the squared error on training contexts by no more than
``tolerance``; eta, by whose half a key is named, likewise.
So the figures of a replacement layer, a transcoder and a sparse autoencoder mean their own reconstruction at one
relative precision, and bits are those of a code that could be written.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from crosshead.analysis.codings import Coded, coded
from crosshead.dictionaries.base import Batch, Trainable

__all__ = ["CodeConfig", "DescriptionLength", "describe"]

_STEPS = 40
"""Half octaves that a step may shrink by: a factor of a million."""


class CodeConfig(BaseModel):
    """How closely reconstructions are sent, and on how many contexts the code is fitted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tolerance: Annotated[float, Field(gt=0)] = 0.01
    """Share by which quantised values, and named keys, may each raise the squared error."""
    train_contexts: Annotated[int, Field(gt=0)] = 16
    """Training contexts that the code's frequencies come from."""
    heldout_contexts: Annotated[int, Field(gt=0)] = 8
    """Held-out contexts that are sent."""


class DescriptionLength(BaseModel):
    """Bits per counted position, and the error of what arrives."""

    bits: float
    """Of activations and positions together."""
    bits_activations: float
    bits_positions: float
    """0 for models that do not say where anything comes from."""
    bits_which: float
    """Of the activations' bits, those that say which units are active."""
    bits_shuffled: float
    """Control: activations' bits with units exchanged among themselves; no lower, or the code has learned nothing."""
    bits_positions_shuffled: float
    """Control: positions' bits with every row's keys in another order."""
    units_active: float
    """Units with a level other than 0, per position."""
    keys_named: float
    """Keys named, per position, the first token's among them."""
    step: float
    """delta, over the root mean square of the target on training contexts."""
    least_weight: float | None
    """eta; None without positions."""
    normalised_mse: float
    """Of the reconstruction before quantisation, on the contexts that are sent."""
    normalised_mse_sent: float
    """After both quantisations."""
    n_tokens: int
    precision_reached: bool
    """Whether both steps kept within the tolerance, on training contexts."""


class _Batch(NamedTuple):
    batch: Batch
    coordinates: Float[Tensor, "N U W"]


@torch.no_grad()
def describe(
    module: Trainable, train: Sequence[Batch], heldout: Sequence[Batch], config: CodeConfig
) -> DescriptionLength:
    """Bits per position of a model's activations and attended positions. ValueError for an architecture without a code.

    Batches hold the sites that the module reads. Steps and frequencies are fitted on ``train``, bits are
    counted on ``heldout``.
    """
    coding = coded(module)
    splits = [[_Batch(b, coding.coordinates(b)) for b in batches] for batches in (train, heldout)]
    variance = _variance(coding, splits[1])
    plain = _error(coding, splits[1], lambda c: c, None)
    # The first step tried, too, comes from training contexts: a grid by held-out size would have seen what is sent.
    size = (_variance(coding, splits[0]) / sum(b.n_counted for b, _ in splits[0])) ** 0.5
    limit = (1 + config.tolerance) * _error(coding, splits[0], lambda c: c, None)
    step, reached = _largest(size, lambda delta: _error(coding, splits[0], _rounder(delta), None), limit)
    least, named_well = None, True
    if coding.has_positions:
        least, named_well = _largest(1.0, lambda eta: _error(coding, splits[0], lambda c: c, eta), limit)
    sent = _error(coding, splits[1], _rounder(step), least)
    levels = [torch.cat([_levels(c, step)[b.mask.flatten()] for b, c in split]) for split in splits]
    which, values, shuffled = _activation_bits(*levels)
    where, where_shuffled, keys = _position_bits(coding, splits, least, step) if least is not None else (0.0, 0.0, 0.0)
    n_tokens = len(levels[1])
    return DescriptionLength(
        bits=which + values + where,
        bits_activations=which + values,
        bits_positions=where,
        bits_which=which,
        bits_shuffled=shuffled,
        bits_positions_shuffled=where_shuffled,
        units_active=float((levels[1] != 0).any(-1).double().sum() / n_tokens),
        keys_named=keys,
        step=step / size,
        least_weight=least,
        normalised_mse=plain / variance,
        normalised_mse_sent=sent / variance,
        n_tokens=n_tokens,
        precision_reached=reached and named_well,
    )


# ---- precision ----


def _rounder(delta: float) -> Callable[[Tensor], Tensor]:
    return lambda coordinates: (coordinates / delta).round() * delta


def _levels(coordinates: Tensor, delta: float) -> Int[Tensor, "N U W"]:
    return (coordinates / delta).round().to(torch.int32)


def _variance(coding: Coded, split: Iterable[_Batch]) -> float:
    return sum(float(coding.target(b)[b.mask].double().square().sum()) for b, _ in split)


def _error(coding: Coded, split: Iterable[_Batch], change: Callable[[Tensor], Tensor], least: float | None) -> float:
    """Summed squared error of the reconstruction from changed coordinates and named keys."""
    total = 0.0
    for batch, coordinates in split:
        prediction = coding.predict(change(coordinates), batch, least)
        total += float((prediction - coding.target(batch))[batch.mask].double().square().sum())
    return total


def _largest(first: float, error: Callable[[float], float], limit: float) -> tuple[float, bool]:
    """The largest of first, first / sqrt 2, ... whose error is within the limit, and whether there is one.

    By bisection: errors grow with the step but for a ripple of less than the tolerance.
    """
    fails, holds = -1, _STEPS
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if error(first * 2 ** (-middle / 2)) <= limit:
            holds = middle
        else:
            fails = middle
    return first * 2 ** (-holds / 2), holds < _STEPS


# ---- activations ----


def _activation_bits(train: Int[Tensor, "m U W"], heldout: Int[Tensor, "n U W"]) -> tuple[float, float, float]:
    """Bits per position: which units are active, with which values; and both with units exchanged."""
    active = (train != 0).any(-1)
    share = (active.double().sum(0) + 0.5) / (len(train) + 1)
    medians, theta = _laws(train, active)
    which, values = _which_bits(heldout, share), _value_bits(heldout, medians, theta)
    order = torch.randperm(train.shape[1], generator=torch.Generator().manual_seed(0)).to(heldout.device)
    exchanged = heldout[:, order]
    shuffled = _which_bits(exchanged, share) + _value_bits(exchanged, medians, theta)
    return which, values, shuffled


def _which_bits(levels: Int[Tensor, "n U W"], share: Float[Tensor, " U"]) -> float:
    counts = (levels != 0).any(-1).double().sum(0)
    return -float((counts * share.log2() + (len(levels) - counts) * (1 - share).log2()).sum() / len(levels))


def _laws(levels: Int[Tensor, "m U W"], active: Bool[Tensor, "m U"]) -> tuple[Tensor, Tensor]:
    """Median level and ratio of a two-sided geometric law for every unit and coordinate, over active rows.

    P(n) = (1 - theta) / (1 + theta) theta^|n - median|; its mean distance from the median is 2 theta / (1 - theta^2).
    """
    n_units, width = levels.shape[1:]
    medians = levels.new_zeros(n_units, width)
    distance = torch.ones(n_units, width, dtype=torch.float64, device=levels.device)
    counts = active.sum(0)
    for unit in torch.nonzero(counts)[:, 0].tolist():
        own = levels[active[:, unit], unit]
        medians[unit] = own.median(0).values
        # One row more, at distance 1, so that no law is certain.
        distance[unit] = ((own - medians[unit]).abs().double().sum(0) + 1) / (len(own) + 1)
    theta = ((1 + distance.square()).sqrt() - 1) / distance
    return medians, theta.clamp(1e-9, 1 - 1e-9)


def _value_bits(levels: Int[Tensor, "n U W"], medians: Tensor, theta: Tensor) -> float:
    active = (levels != 0).any(-1)
    rows, units = torch.nonzero(active, as_tuple=True)
    distance = (levels[rows, units] - medians[units]).abs().double()
    ratio = theta[units]
    bits = -(((1 - ratio) / (1 + ratio)).log2() + distance * ratio.log2())
    return float(bits.sum() / len(levels))


# ---- positions ----


class _Counts:
    """How many keys of a pattern are named, of how many, by octave of distance; and the weights of those named."""

    def __init__(self, n_patterns: int, n_octaves: int):
        self.named, self.seen = (torch.zeros(n_patterns, n_octaves, dtype=torch.float64) for _ in range(2))
        self.levels = torch.zeros(n_patterns, dtype=torch.float64)


def _position_bits(
    coding: Coded, splits: Sequence[Sequence[_Batch]], least: float, step: float
) -> tuple[float, float, float]:
    """Bits per position of the keys that patterns name, with rows in another order, and keys named per position."""
    length = splits[1][0].batch.mask.shape[1]
    octave = _octaves(length)
    fitted, sent, shuffled = (_Counts(coding.n_patterns, int(octave.max()) + 1) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    for counts, split in ((fitted, splits[0]), (sent, splits[1])):
        for batch, coordinates in split:
            told = coding.patterns_told(_levels(coordinates, step), batch)
            for groups, pattern in coding.each_pattern(batch):
                levels = (pattern / least).round().to(torch.int32)
                rows = told[:, groups] & batch.mask[:, None]
                _count(counts, groups, levels, rows, octave)
                if counts is sent:
                    _count(shuffled, groups, _reordered(levels, generator), rows, octave)
    share = (fitted.named + 0.5) / (fitted.seen + 1)
    n_tokens = sum(b.n_counted for b, _ in splits[1])
    bits = _named_bits(sent, share)
    other = _named_bits(shuffled, share)
    if coding.weights_of_keys:
        # Levels 1, 2, ... by a geometric law with the mean that was seen: P(n) = (1 - theta) theta^(n - 1).
        mean = (fitted.levels + 2) / (fitted.named.sum(1) + 1)
        theta = (1 - 1 / mean).clamp(1e-9, 1 - 1e-9)
        named = sent.named.sum(1)
        weights = float(-(named * (1 - theta).log2() + (sent.levels - named) * theta.log2()).sum())
        bits, other = bits + weights, other + weights
    return bits / n_tokens, other / n_tokens, float(sent.named.sum()) / n_tokens


def _named_bits(counts: _Counts, share: Float[Tensor, "G octaves"]) -> float:
    return float(-(counts.named * share.log2() + (counts.seen - counts.named) * (1 - share).log2()).sum())


def _octaves(length: int) -> Int[Tensor, "T T"]:
    """Octave of every key's distance to the query, from 1 on; 0 is the first token; future keys have none (-1)."""
    position = torch.arange(length)
    distance = position[:, None] - position
    octave = (distance.clamp(min=0) + 1).double().log2().floor().long() + 1
    octave[:, 0] = 0
    return octave.masked_fill(distance < 0, -1)


def _count(
    counts: _Counts, groups: slice, levels: Int[Tensor, "B g T T"], rows: Bool[Tensor, "B g T"],
    octave: Int[Tensor, "T T"],
) -> None:  # fmt: skip
    named = (levels > 0) & rows[..., None]
    kinds = nn.functional.one_hot(octave + 1, counts.named.shape[1] + 1)[..., 1:].float().to(levels.device)
    per_pair = named.sum(0).float()
    counts.named[groups] += (per_pair.flatten(1) @ kinds.flatten(0, 1)).double().cpu()
    counts.seen[groups] += (rows.sum(0).float() @ kinds.sum(1)).double().cpu()
    counts.levels[groups] += (levels * named).sum((0, 2, 3)).double().cpu()


def _reordered(levels: Int[Tensor, "B g T T"], generator: torch.Generator) -> Int[Tensor, "B g T T"]:
    """Every row's keys up to the query's own in another order, the first token's among them."""
    length = levels.shape[-1]
    keys = torch.rand(length, length, generator=generator)
    keys = keys + 2.0 * torch.ones(length, length).triu(1)  # future keys sort last and stay there
    order = keys.argsort(1).to(levels.device)
    return levels.gather(-1, order.expand(levels.shape))
