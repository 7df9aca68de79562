r"""Differentiable products of sparse codes: exact gradients at the price of one dense product.

Shape legend: B contexts, T positions, N = B*T rows, F features, Z non-zeros, X input width, D decoder width,
H heads, M = H + 1 movers (index 0 is the identity).

    encode         pre_j = x[n_j] . w[i_j] + b[i_j] at the active entries j = (n, i), and sum_n pre_ni per feature
    decode         y[n] = sum_j f_j d[i_j]
    mixed_decode   y[t] = sum_h A_h(t, s) V_h[s] + V_0[t],  V_m[n] = sum_j L[m, i_j] f_j d[i_j]

The encoder's product is the only dense work (``maths.scan`` computes it and chooses the entries). Everything here
reads and writes non-zeros only. So does the penalty on negative pre-activations, which sees every entry:
sum_n relu(-pre_ni) = sum_n f_ni - sum_n pre_ni, and sum_n pre_ni = w_i . sum_n x_n + N b_i is one column sum.

In ``mixed_decode`` the heads are fused: every active decoder row is read once for all of them. It goes context by
context, so one [T, M, D] is in memory at a time, and V is not kept for backward.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from crosshead.maths.backends import Backend, backend
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product

__all__ = ["Encoded", "decode", "encode", "mixed_decode"]


class Encoded(NamedTuple):
    """Pre-activations of a batch."""

    pre: SparseCodes
    """At the chosen entries."""
    sums: Float[Tensor, " F"] | None
    """Over all counted rows, whether chosen or not; None where nobody asked."""


def encode(product: Product, structure: SparseCodes, engine: Engine, *, with_sums: bool = False) -> Encoded:
    """Make pre-activations that a scan of ``product`` has chosen differentiable in x, W and b.

    ``structure``: what a function of ``maths.scan`` returned for this product.
    """
    x, weight, bias, mask = product
    values, sums = _Encode.apply(x, weight, bias, structure, mask, engine, with_sums)
    return Encoded(structure.with_values(values), sums if with_sums else None)


def decode(codes: SparseCodes, decoder: Float[Tensor, "F D"], engine: Engine | None = None) -> Float[Tensor, "N D"]:
    """Sparse times dense: every row's active decoder rows, weighted and summed."""
    return _Decode.apply(codes.values, decoder, codes, engine or Engine())


def mixed_decode(
    codes: SparseCodes,
    loadings: Float[Tensor, "M F"],
    decoder: Float[Tensor, "F D"],
    patterns: Float[Tensor, "B H T T"],
    engine: Engine | None = None,
    movers: Bool[Tensor, "M F"] | None = None,
) -> Float[Tensor, "B T D"]:
    """Decode every head's share of the codes and move it by the head's pattern.

    ``patterns`` are causal: what lies above their diagonal is not read. ``movers`` (all by default): only these
    loadings are used and get a gradient; the price falls with their number.
    """
    n_contexts, n_heads, n_positions, _ = patterns.shape
    if len(loadings) != n_heads + 1 or codes.n_rows != n_contexts * n_positions:
        raise ValueError(f"got {len(loadings)} rows of loadings and {codes.n_rows} rows of codes; patterns of shape "
                         f"{tuple(patterns.shape)} need {n_heads + 1} and {n_contexts * n_positions}")  # fmt: skip
    return _MixedDecode.apply(codes.values, loadings, decoder, patterns, codes, engine or Engine(), movers)


# ---- encode ----


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, structure: SparseCodes, mask: Tensor, engine: Engine,
        with_sums: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        rows = _working(x)
        with torch.autocast(x.device.type, enabled=False):  # differences of these sums are small
            counted = mask.to(x.dtype)
            common, n_counted = counted @ x, counted.sum()
            sums = torch.addmv(n_counted * bias, weight, common) if with_sums else bias.new_empty(0)
        ctx.save_for_backward(rows, weight, counted, common, n_counted)
        ctx.structure, ctx.engine = structure, engine
        return structure.values.clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, counted, common, n_counted = ctx.saved_tensors
        structure: SparseCodes = ctx.structure
        grad, grad_sums = gradients
        grad = common.new_zeros(len(structure.columns)) if grad is None else grad.contiguous()
        share = common.new_zeros(structure.n_features) if grad_sums is None else grad_sums.contiguous()
        codes = structure.with_values(grad)
        grad_weight = _plain(codes, x, ctx.engine).weighted_columns(codes, x, share, common)
        grad_bias = codes.feature_sums() + n_counted * share
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _plain(codes, weight, ctx.engine).weighted_rows(codes, weight)
            if grad_sums is not None:
                grad_x = torch.addr(grad_x, counted, share @ weight)
        return grad_x, grad_weight, grad_bias, None, None, None, None


# ---- decode ----


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, structure: SparseCodes, engine: Engine) -> Tensor:
        table = _working(decoder).contiguous()
        ctx.save_for_backward(values, table)
        ctx.structure, ctx.engine = structure, engine
        codes = structure.with_values(values.detach())
        return _plain(codes, table, engine).weighted_rows(codes, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        values, table = ctx.saved_tensors
        codes: SparseCodes = ctx.structure.with_values(values)
        grad = gradients[0].to(table.dtype).contiguous()
        return *_plain(codes, table, ctx.engine).decode_gradients(codes, grad, table), None, None


def _plain(codes: SparseCodes, table: Float[Tensor, "rows D"], engine: Engine) -> Backend:
    """What multiplies codes without movers with rows as wide as those of ``table``."""
    n_rows, n_features, width = codes.n_rows, codes.n_features, table.shape[1]
    return backend(table.device, dense=engine.prefers_dense(n_rows, n_features, 1, len(codes.columns), width))


# ---- mixed decode ----


class _MixedDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, loadings: Tensor, decoder: Tensor, patterns: Tensor, structure: SparseCodes,
        engine: Engine, movers: Tensor | None,
    ) -> Tensor:  # fmt: skip
        table, patterns = _working(decoder), _working(patterns)
        ctx.save_for_backward(values, loadings, table, patterns)
        ctx.structure, ctx.engine, ctx.movers = structure, engine, movers
        mixing = Mixing.of(structure.with_values(values), loadings, table, movers)
        products, moves = _mixing_products(mixing, engine), backend(table.device)
        y_BTD = decoder.new_empty(len(patterns), patterns.shape[2], table.shape[1])
        for contexts, rows, shares_CTMD in _context_groups(mixing, patterns, engine):
            products.mix(mixing, shares_CTMD.flatten(0, 1), rows.start, rows.stop)
            moves.apply_patterns(patterns[contexts], shares_CTMD, y_BTD[contexts])
        return y_BTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        values, loadings, table, patterns = ctx.saved_tensors
        grad_BTD = gradients[0].to(table.dtype).contiguous()
        mixing = Mixing.of(ctx.structure.with_values(values), loadings, table, ctx.movers)
        products, moves = _mixing_products(mixing, ctx.engine), backend(table.device)
        grads = MixGradients(torch.empty_like(values), torch.zeros_like(mixing.loadings_FM),
                             torch.zeros_like(table, dtype=values.dtype))  # fmt: skip
        grad_patterns = torch.zeros_like(patterns) if ctx.needs_input_grad[3] else None
        for contexts, rows, shares_CTMD in _context_groups(mixing, patterns, ctx.engine):
            shares = shares_CTMD.flatten(0, 1)
            if grad_patterns is not None:
                products.mix(mixing, shares, rows.start, rows.stop)
                moved = torch.einsum("ctd,cshd->chts", grad_BTD[contexts], shares_CTMD[:, :, 1:])
                grad_patterns[contexts] = moved.tril()
            moves.transpose_patterns(patterns[contexts], grad_BTD[contexts], shares_CTMD)
            products.unmix(mixing, shares, rows.start, rows.stop, grads)
        grad_loadings = grads.loadings_FM.T
        if ctx.movers is not None:
            grad_loadings = grad_loadings * ctx.movers
        return grads.values, grad_loadings, grads.decoder, grad_patterns, None, None, None


def _mixing_products(mixing: Mixing, engine: Engine) -> Backend:
    """What takes the movers' shares and their gradients."""
    codes, (n_movers, width) = mixing.codes, (mixing.loadings_FM.shape[1], mixing.decoder.shape[1])
    dense = engine.prefers_dense(codes.n_rows, codes.n_features, n_movers, mixing.n_moves, width)
    return backend(mixing.decoder.device, dense=dense)


def _context_groups(
    mixing: Mixing, patterns: Float[Tensor, "B H T T"], engine: Engine
) -> Iterator[tuple[slice, slice, Float[Tensor, "C T M D"]]]:
    """Some contexts, their rows, and memory for the movers' shares of them, which the next ones get again."""
    n_contexts, _, n_positions, _ = patterns.shape
    shape = (n_positions, mixing.loadings_FM.shape[1], mixing.decoder.shape[1])
    bytes_each = math.prod(shape) * mixing.decoder.element_size()
    size = min(max(1, int(engine.shares_mib * 2**20 / max(1, bytes_each))), n_contexts)
    memory = mixing.decoder.new_empty(size, *shape)
    for first in range(0, n_contexts, max(size, 1)):
        last = min(first + size, n_contexts)
        yield slice(first, last), slice(first * n_positions, last * n_positions), memory[: last - first]


def _working(tensor: Tensor) -> Tensor:
    """The tensor in the type that products have: autocast's, where it is on."""
    kind = tensor.device.type
    on = kind != "cpu" and torch.is_autocast_enabled(kind)
    return tensor.detach().to(torch.get_autocast_dtype(kind)) if on else tensor.detach()
