# pyright: reportArgumentType=false, reportReturnType=false
# Kernels are launched with plain numbers for what their signatures call constexpr.
"""The sparse engine on a GPU: Triton kernels.

Shape legend: see ``maths.sparse``, which says what every function computes. All backends offer the same functions.

No sum depends on the order in which programs run, nor on how a kernel was tuned (steps along X are fixed).

Active entries are marked in a bit mask [N, F / 32] by the kernel that computes the product, then counted, listed, and
their pre-activations computed again at the active entries only: that reads less than the product would write. An entry
at its threshold may land on either side of it by rounding, and the mask is whole whatever ``Engine.tile_mib``. The k
largest of every row are taken by torch.

Sums over a feature's non-zeros run in the order of rows, one program for each feature. Products are taken in the type
of the tables and summed in float32 (float64 for float64 tables).
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product
from crosshead.maths.on_torch import apply_patterns, keep_largest, largest_per_row, transpose_patterns

__all__ = [
    "apply_patterns",
    "decode_gradients",
    "keep_largest",
    "larger_entries",
    "largest_per_row",
    "mix",
    "transpose_patterns",
    "unmix",
    "weighted_columns",
    "weighted_rows",
]

_WORD = 32
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TUNED = [triton.Config({"DB": db}, num_warps=warps) for db in (64, 128, 256) for warps in (2, 4)]
_TUNED_PRODUCT = [
    triton.Config({"NB": nb, "FB": fb, "XB": xb}, num_warps=warps, num_stages=stages)
    for nb, fb, xb, warps, stages in ((64, 128, 32, 4, 3), (128, 128, 32, 8, 3), (128, 256, 32, 8, 3))
]


def _tuned(configs: list[triton.Config], **settings: Any) -> Callable[[Any], Any]:
    """Try all configurations on a GPU; the interpreter cannot tell them apart and takes the first."""
    return triton.autotune(configs[:1] if _INTERPRETED else configs, **settings)


# ---- the encoder's product ----


@_tuned(_TUNED_PRODUCT, key=["F", "X"])
@triton.jit
def _mark_larger(x, weight, bias, scale, level, mask, bits, N, F, X, WORDS, SUM: tl.constexpr, PRECISION: tl.constexpr,
                 NB: tl.constexpr, FB: tl.constexpr, XB: tl.constexpr):  # fmt: skip
    """Set the bit of every entry of the product whose score exceeds its level."""
    rows = tl.program_id(0) * NB + tl.arange(0, NB)
    features = tl.program_id(1) * FB + tl.arange(0, FB)
    total = tl.zeros((NB, FB), dtype=SUM)
    for first in range(0, X, XB):
        inputs = first + tl.arange(0, XB)
        a = tl.load(x + rows[:, None] * X + inputs[None, :], (rows[:, None] < N) & (inputs[None, :] < X), other=0.0)
        b = tl.load(weight + features[None, :].to(tl.int64) * X + inputs[:, None],
                    (features[None, :] < F) & (inputs[:, None] < X), other=0.0)  # fmt: skip
        total += tl.dot(a, b, input_precision=PRECISION, out_dtype=SUM)
    inside = features < F
    total += tl.load(bias + features, inside, other=0.0)[None, :]
    scores = total * tl.load(scale + features, inside, other=0.0)[None, :]
    larger = scores > tl.load(level + features, inside, other=float("inf"))[None, :]
    counted = tl.load(mask + rows, rows < N, other=0) != 0
    active = (larger & counted[:, None] & inside[None, :]).to(tl.int32)
    grouped = tl.reshape(active, (NB, FB // 32, 32))
    packed = tl.sum(grouped << tl.arange(0, 32)[None, None, :], axis=2)
    words = tl.program_id(1) * (FB // 32) + tl.arange(0, FB // 32)
    tl.store(bits + rows[:, None] * WORDS + words[None, :], packed, (rows[:, None] < N) & (words[None, :] < WORDS))


@triton.jit
def _count_bits(bits, counts, WORDS, WB: tl.constexpr):
    """Number of bits set in a row."""
    row = tl.program_id(0)
    total = tl.zeros((WB,), dtype=tl.int32)
    for first in range(0, WORDS, WB):
        words = first + tl.arange(0, WB)
        packed = tl.load(bits + row * WORDS + words, words < WORDS, other=0)
        single = (packed[:, None] >> tl.arange(0, 32)[None, :]) & 1
        total += tl.sum(single, axis=1)
    tl.store(counts + row, tl.sum(total, axis=0).to(tl.int64))


@triton.jit
def _list_bits(bits, row_offsets, columns, WORDS, WB: tl.constexpr):
    """Positions of the bits set in a row, ascending."""
    row = tl.program_id(0)
    at = tl.load(row_offsets + row)
    for first in range(0, WORDS, WB):
        words = first + tl.arange(0, WB)
        packed = tl.load(bits + row * WORDS + words, words < WORDS, other=0)
        single = tl.reshape((packed[:, None] >> tl.arange(0, 32)[None, :]) & 1, (WB * 32,))
        place = at + tl.cumsum(single, axis=0) - 1
        column = first * 32 + tl.arange(0, WB * 32)
        tl.store(columns + place, column.to(tl.int64), single == 1)
        at += tl.sum(single, axis=0)


@triton.jit
def _sampled_products(row_offsets, columns, x, table, out, X, SUM: tl.constexpr, XB: tl.constexpr):
    """x[n] . table[column_j] for the non-zeros j of a row n."""
    row = tl.program_id(0)
    inputs = tl.arange(0, XB)
    own = tl.load(x + row * X + inputs, inputs < X, other=0.0).to(SUM)
    for j in range(tl.load(row_offsets + row), tl.load(row_offsets + row + 1)):
        other = tl.load(table + tl.load(columns + j) * X + inputs, inputs < X, other=0.0).to(SUM)
        tl.store(out + j, tl.sum(own * other, axis=0))


def larger_entries(product: Product, scale: Tensor, level: Tensor, engine: Engine) -> SparseCodes:
    """All entries whose score exceeds its feature's level."""
    x, weight, bias, mask = product
    if torch.is_autocast_enabled(x.device.type):
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    x, weight = x.contiguous(), weight.contiguous()
    (n_rows, width), n_features = x.shape, len(weight)
    n_words = -(-n_features // _WORD)
    bits = torch.zeros(n_rows, n_words, dtype=torch.int32, device=x.device)

    def grid(settings: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(n_rows, settings["NB"]), triton.cdiv(n_features, settings["FB"])

    precision = "ieee" if x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32 else "tf32"
    _mark_larger[grid](x, weight, bias, scale, level, mask.to(torch.int8), bits, n_rows, n_features, width, n_words,
                       SUM=_sum_type(x), PRECISION=precision)  # fmt: skip
    counts = torch.empty(n_rows, dtype=torch.long, device=x.device)
    _count_bits[(n_rows,)](bits, counts, n_words, WB=16)
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    columns = torch.empty(int(offsets[-1]), dtype=torch.long, device=x.device)
    _list_bits[(n_rows,)](bits, offsets, columns, n_words, WB=16)
    codes = SparseCodes(offsets, columns, bias.new_empty(len(columns)), n_features)
    return codes.with_values(_products(codes, x, weight) + bias[columns])


def _products(codes: SparseCodes, x: Float[Tensor, "N X"], table: Float[Tensor, "F X"]) -> Float[Tensor, " Z"]:
    """x[n_j] . table[i_j] at the non-zeros only."""
    out = torch.empty_like(codes.values)
    _sampled_products[(codes.n_rows,)](codes.row_offsets, codes.columns, x, table, out, x.shape[1], SUM=_sum_type(x),
                                       XB=triton.next_power_of_2(x.shape[1]))  # fmt: skip
    return out


# ---- products by row and by feature ----


@_tuned(_TUNED, key=["M", "D"])
@triton.jit
def _mix_rows(row_offsets, columns, values, loadings, decoder, out, first, M, D, SUM: tl.constexpr, MB: tl.constexpr,
              DB: tl.constexpr):  # fmt: skip
    """out[n - first, m] = sum over row n's non-zeros j of loadings[column_j, m] * values[j] * decoder[column_j]."""
    row = tl.program_id(0)
    m, d = tl.arange(0, MB), tl.program_id(1) * DB + tl.arange(0, DB)
    total = tl.zeros((MB, DB), dtype=SUM)
    for j in range(tl.load(row_offsets + first + row), tl.load(row_offsets + first + row + 1)):
        column = tl.load(columns + j)
        weights = tl.load(loadings + column * M + m, m < M, other=0.0).to(SUM) * tl.load(values + j).to(SUM)
        total += weights[:, None] * tl.load(decoder + column * D + d, d < D, other=0.0).to(SUM)[None, :]
    place = out + (row * M + m[:, None]) * D + d[None, :]
    tl.store(place, total.to(out.dtype.element_ty), (m[:, None] < M) & (d[None, :] < D))


@_tuned(_TUNED, key=["D"], restore_value=["out"])
@triton.jit
def _sum_columns(column_offsets, entries, sources, weights, table, share, common, out, low, high, D,
                 SUM: tl.constexpr, DB: tl.constexpr):  # fmt: skip
    """out[i] += share[i] * common + sum over the column's entries e in low to high of weights[e] * table[source]."""
    feature = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * DB + tl.arange(0, DB)
    total = tl.load(out + feature * D + d, d < D, other=0.0).to(SUM)
    total += tl.load(share + feature).to(SUM) * tl.load(common + d, d < D, other=0.0).to(SUM)
    for j in range(tl.load(column_offsets + feature), tl.load(column_offsets + feature + 1)):
        entry = tl.load(entries + j)
        used = (entry >= low) & (entry < high)
        weight = tl.load(weights + entry, used, other=0.0).to(SUM)
        total += weight * tl.load(table + tl.load(sources + j) * D + d, (d < D) & used, other=0.0).to(SUM)
    tl.store(out + feature * D + d, total.to(out.dtype.element_ty), d < D)


@triton.jit
def _unmix_rows(row_offsets, columns, values, loadings, decoder, grad, grad_values, products, mixed, first, low, M, D,
                SUM: tl.constexpr, MB: tl.constexpr, DB: tl.constexpr):  # fmt: skip
    """For the non-zeros j of a row: grad_values[j], products[j] = values[j] * grad . d, mixed[j] = sum_m L_m grad_m."""
    row = tl.program_id(0)
    m = tl.arange(0, MB)
    for j in range(tl.load(row_offsets + first + row), tl.load(row_offsets + first + row + 1)):
        column = tl.load(columns + j)
        own = tl.load(loadings + column * M + m, m < M, other=0.0).to(SUM)
        dots = tl.zeros((MB,), dtype=SUM)
        for start in range(0, D, DB):
            d = start + tl.arange(0, DB)
            place = grad + (row * M + m[:, None]) * D + d[None, :]
            block = tl.load(place, (m[:, None] < M) & (d[None, :] < D), other=0.0).to(SUM)
            dots += tl.sum(block * tl.load(decoder + column * D + d, d < D, other=0.0).to(SUM)[None, :], axis=1)
            pulled = tl.sum(block * own[:, None], axis=0)
            tl.store(mixed + (j - low) * D + d, pulled.to(mixed.dtype.element_ty), d < D)
        tl.store(grad_values + j, tl.sum(dots * own, axis=0))
        tl.store(products + (j - low) * M + m, dots * tl.load(values + j).to(SUM), m < M)


def weighted_rows(codes: SparseCodes, table: Float[Tensor, "F D"]) -> Float[Tensor, "N D"]:
    """Codes times ``table``."""
    out = codes.values.new_empty(codes.n_rows, 1, table.shape[1])
    ones = codes.values.new_ones(codes.n_features, 1)
    _launch_mix(codes, ones, table.contiguous(), out, 0)
    return out[:, 0]


def weighted_columns(
    codes: SparseCodes, table: Float[Tensor, "N X"], share: Float[Tensor, " F"], common: Float[Tensor, " X"]
) -> Float[Tensor, "F X"]:
    """Transposed codes times ``table``, plus share[i] * common in every row."""
    out = codes.values.new_zeros(codes.n_features, table.shape[1])
    _add_columns(codes, codes.by_column.rows, codes.values, table.contiguous(), out, share=share, common=common)
    return out


def decode_gradients(
    codes: SparseCodes, grad: Float[Tensor, "N D"], decoder: Float[Tensor, "F D"]
) -> tuple[Float[Tensor, " Z"], Float[Tensor, "F D"]]:
    """Gradients of values and decoder, given those of codes times decoder."""
    grad_decoder = codes.values.new_zeros(decoder.shape)
    _add_columns(codes, codes.by_column.rows, codes.values, grad, grad_decoder)
    return _products(codes, grad, decoder), grad_decoder


def mix(mixing: Mixing, out: Float[Tensor, "n M D"], first: int, last: int) -> None:
    """Every mover's share of rows ``first`` to ``last``. Loadings of movers that take no share are zero."""
    _launch_mix(mixing.codes, mixing.loadings_FM, mixing.decoder, out, first)


def unmix(mixing: Mixing, grad: Float[Tensor, "n M D"], first: int, last: int, into: MixGradients) -> None:
    """Add the gradients of everything through rows ``first`` to ``last``, given those of the movers' shares.

    A non-zero's pull on its decoder row is written down once, [D] instead of [M, D], and then summed by feature.
    """
    codes, (n_movers, width) = mixing.codes, (mixing.loadings_FM.shape[1], mixing.decoder.shape[1])
    low, high = int(codes.row_offsets[first]), int(codes.row_offsets[last])
    products = codes.values.new_empty(high - low, n_movers)
    mixed = grad.new_empty(high - low, width)
    _unmix_rows[(last - first,)](
        codes.row_offsets, codes.columns, codes.values, mixing.loadings_FM, mixing.decoder, grad, into.values, products,
        mixed, first, low, n_movers, width, SUM=_sum_type(grad), MB=triton.next_power_of_2(n_movers),
        DB=min(128, triton.next_power_of_2(width)),
    )  # fmt: skip
    sources = codes.by_column.entries - low
    _add_columns(codes, sources, codes.values, mixed, into.decoder, low=low, high=high)
    _add_columns(codes, sources, torch.ones_like(codes.values), products, into.loadings_FM, low=low, high=high)


def _launch_mix(codes: SparseCodes, loadings_FM: Tensor, decoder: Tensor, out: Tensor, first: int) -> None:
    n_movers, width = loadings_FM.shape[1], decoder.shape[1]

    def grid(settings: dict[str, int]) -> tuple[int, int]:
        return len(out), triton.cdiv(width, settings["DB"])

    _mix_rows[grid](codes.row_offsets, codes.columns, codes.values, loadings_FM, decoder, out, first, n_movers, width,
                    SUM=_sum_type(decoder), MB=triton.next_power_of_2(n_movers))  # fmt: skip


def _add_columns(
    codes: SparseCodes, sources: Tensor, weights: Tensor, table: Tensor, out: Tensor, *, low: int = 0,
    high: int | None = None, share: Tensor | None = None, common: Tensor | None = None,
) -> None:  # fmt: skip
    width = table.shape[1]

    def grid(settings: dict[str, int]) -> tuple[int, int]:
        return codes.n_features, triton.cdiv(width, settings["DB"])

    share = weights.new_zeros(codes.n_features) if share is None else share
    common = weights.new_zeros(width) if common is None else common
    high = len(codes.columns) if high is None else high
    order = codes.by_column
    # The tuner runs a kernel several times, and this one adds: it restores ``out`` in between.
    _sum_columns[grid](order.offsets, order.entries, sources, weights, table, share, common, out, low, high, width,
                       SUM=_sum_type(table))  # fmt: skip


def _sum_type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
