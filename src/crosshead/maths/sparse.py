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

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from crosshead.maths.backends import Backend, backend
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.forms import MixGradients, Mixing, Product

__all__ = ["Encoded", "decode", "encode", "mixed_decode"]

_BLOCK = 128  # query positions that share one causal cut of the keys


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
        ctx.save_for_backward(x, weight, mask)
        ctx.structure, ctx.engine = structure, engine
        sums = bias.new_empty(0)
        if with_sums:
            counted = mask.to(x.dtype)
            sums = torch.addmv(counted.sum() * bias, weight, counted @ x)
        return structure.values.clone(), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, mask = ctx.saved_tensors
        s: SparseCodes = ctx.structure
        grad, grad_sums = gradients
        grad = x.new_zeros(len(s.columns)) if grad is None else grad.contiguous()
        share = x.new_zeros(s.n_features) if grad_sums is None else grad_sums.contiguous()
        counted = mask.to(x.dtype)
        codes = s.with_values(grad)
        grad_weight = _plain(codes, x, ctx.engine).weighted_columns(codes, x, share, counted @ x)
        grad_bias = codes.feature_sums() + counted.sum() * share
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
        ctx.save_for_backward(values, decoder)
        ctx.structure, ctx.engine = structure, engine
        codes, table = structure.with_values(values.detach()), decoder.detach()
        return _plain(codes, table, engine).weighted_rows(codes, table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, decoder = ctx.saved_tensors
        codes: SparseCodes = ctx.structure.with_values(values)
        grads = _plain(codes, decoder, ctx.engine).decode_gradients(codes, gradients[0].contiguous(), decoder)
        return *grads, None, None


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
        ctx.save_for_backward(values, loadings, decoder, patterns)
        ctx.structure, ctx.engine, ctx.movers = structure, engine, movers
        mixing = Mixing.of(structure.with_values(values), loadings, decoder, movers)
        products = _mixing_products(mixing, engine)
        n_contexts, _, n_positions, _ = patterns.shape
        shares_TMD = decoder.new_empty(n_positions, len(loadings), decoder.shape[1])
        y_BTD = decoder.new_empty(n_contexts, n_positions, decoder.shape[1])
        for b in range(n_contexts):
            products.mix(mixing, shares_TMD, b * n_positions, (b + 1) * n_positions)
            _apply_patterns(patterns[b], shares_TMD, y_BTD[b])
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_BTD = gradients[0].contiguous()
        values, loadings, decoder, patterns = ctx.saved_tensors
        mixing = Mixing.of(ctx.structure.with_values(values), loadings, decoder, ctx.movers)
        products = _mixing_products(mixing, ctx.engine)
        n_contexts, _, n_positions, _ = patterns.shape
        shares_TMD = decoder.new_empty(n_positions, len(loadings), decoder.shape[1])
        grads = MixGradients(torch.empty_like(values), torch.zeros_like(mixing.loadings_FM), torch.zeros_like(decoder))
        grad_patterns = torch.zeros_like(patterns) if ctx.needs_input_grad[3] else None
        for b in range(n_contexts):
            first, last = b * n_positions, (b + 1) * n_positions
            if grad_patterns is not None:
                products.mix(mixing, shares_TMD, first, last)
                grad_patterns[b] = (grad_BTD[b] @ shares_TMD[:, 1:].permute(1, 2, 0)).tril()
            _transpose_patterns(patterns[b], grad_BTD[b], shares_TMD)
            products.unmix(mixing, shares_TMD, first, last, grads)
        grad_loadings = grads.loadings_FM.T
        if ctx.movers is not None:
            grad_loadings = grad_loadings * ctx.movers
        return grads.values, grad_loadings, grads.decoder, grad_patterns, None, None, None


def _mixing_products(mixing: Mixing, engine: Engine) -> Backend:
    n_movers, width = mixing.loadings_FM.shape[1], mixing.decoder.shape[1]
    codes = mixing.codes
    dense = engine.prefers_dense(codes.n_rows, codes.n_features, n_movers, mixing.n_moves, width)
    return backend(mixing.decoder.device, dense=dense)


def _apply_patterns(
    patterns_HTT: Float[Tensor, "H T T"], shares_TMD: Float[Tensor, "T M D"], out_TD: Float[Tensor, "T D"]
) -> None:
    """out[t] = shares[t, 0] + sum over h and s <= t of pattern_h(t, s) shares[s, h+1]."""
    out_TD.copy_(shares_TMD[:, 0])
    for first in range(0, len(out_TD), _BLOCK):
        last = min(first + _BLOCK, len(out_TD))
        for h, pattern in enumerate(patterns_HTT):
            out_TD[first:last].addmm_(pattern[first:last, :last], shares_TMD[:last, h + 1])


def _transpose_patterns(
    patterns_HTT: Float[Tensor, "H T T"], grad_TD: Float[Tensor, "T D"], shares_TMD: Float[Tensor, "T M D"]
) -> None:
    """The gradient of every mover's share at its source."""
    shares_TMD[:, 0] = grad_TD
    for first in range(0, len(grad_TD), _BLOCK):
        last = min(first + _BLOCK, len(grad_TD))
        for h, pattern in enumerate(patterns_HTT):
            torch.mm(pattern[first:, first:last].T, grad_TD[first:], out=shares_TMD[first:last, h + 1])
