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
from torch.nn import functional

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.scan import Product
from crosshead.maths.threads import balanced_ranges, on_ranges

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
        grad_weight = _weighted_columns(codes, x, share, counted @ x, ctx.engine)
        grad_bias = codes.feature_sums() + counted.sum() * share
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _weighted_rows(codes, weight, ctx.engine)
            if grad_sums is not None:
                grad_x = torch.addr(grad_x, counted, share @ weight)
        return grad_x, grad_weight, grad_bias, None, None, None, None


def _weighted_columns(
    codes: SparseCodes, table: Float[Tensor, "N X"], share: Float[Tensor, " F"], common: Float[Tensor, " X"],
    engine: Engine,
) -> Float[Tensor, "F X"]:  # fmt: skip
    """Transposed codes times ``table``, plus share[i] * common in every row."""
    if _dense(codes, 1, len(codes.columns), table.shape[1], engine):
        return torch.addr(codes.to_dense().T @ table, share, common)
    from crosshead.maths import kernels_cpu

    order = codes.by_column
    out = table.new_empty(codes.n_features, table.shape[1])
    arrays = (*order, codes.values, table.contiguous(), share, common, out)
    on_ranges(kernels_cpu.weighted_columns, balanced_ranges(order.offsets), *_numpy(arrays))
    return out


def _weighted_rows(codes: SparseCodes, table: Float[Tensor, "F D"], engine: Engine) -> Float[Tensor, "N D"]:
    """Codes times ``table``."""
    if _dense(codes, 1, len(codes.columns), table.shape[1], engine):
        return codes.to_dense() @ table
    from crosshead.maths import kernels_cpu

    out = table.new_empty(codes.n_rows, table.shape[1])
    arrays = (codes.row_offsets, codes.columns, codes.values, table.contiguous(), out)
    on_ranges(kernels_cpu.weighted_rows, balanced_ranges(codes.row_offsets), *_numpy(arrays))
    return out


# ---- decode ----


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, decoder: Tensor, structure: SparseCodes, engine: Engine) -> Tensor:
        ctx.save_for_backward(values, decoder)
        ctx.structure, ctx.engine = structure, engine
        return _weighted_rows(structure.with_values(values.detach()), decoder.detach(), engine)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, decoder = ctx.saved_tensors
        codes: SparseCodes = ctx.structure.with_values(values)
        grad = gradients[0].contiguous()
        if _dense(codes, 1, len(codes.columns), decoder.shape[1], ctx.engine):
            products = grad @ decoder.T
            return products[codes.rows, codes.columns], codes.to_dense().T @ grad, None, None
        from crosshead.maths import kernels_cpu

        order = codes.by_column
        grad_values, grad_decoder = torch.empty_like(values), torch.empty_like(decoder)
        arrays = (*order, values, grad, decoder, grad_values, grad_decoder)
        on_ranges(kernels_cpu.decode_columns, balanced_ranges(order.offsets), *_numpy(arrays))
        return grad_values, grad_decoder, None, None


# ---- mixed decode ----


class _Mix(NamedTuple):
    """What both directions of a mixed decode work on."""

    codes: SparseCodes
    loadings_FM: Tensor
    decoder: Tensor
    movers: Tensor | None
    lists: tuple[Tensor, Tensor] | None
    """Every feature's movers one after the other, and where they begin; None for all of them."""
    dense: bool

    @classmethod
    def of(
        cls, codes: SparseCodes, loadings: Tensor, decoder: Tensor, movers: Tensor | None, engine: Engine
    ) -> "_Mix":
        n_movers, lists = len(loadings), None
        n_moves = n_movers * len(codes.columns)
        if movers is not None:
            loadings = loadings * movers
            per_feature = movers.sum(0)
            lists = functional.pad(per_feature.cumsum(0), (1, 0)), torch.nonzero(movers.T)[:, 1].contiguous()
            n_moves = int(per_feature[codes.columns].sum())
        dense = _dense(codes, n_movers, n_moves, decoder.shape[1], engine)
        return cls(codes, loadings.T.contiguous(), decoder.contiguous(), movers, lists, dense)

    def rows(self, first: int, last: int) -> Float[Tensor, "n F"]:
        """Some rows as a dense matrix."""
        offsets = self.codes.row_offsets[first : last + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        codes = SparseCodes(offsets - offsets[0], self.codes.columns[part], self.codes.values[part],
                            self.codes.n_features)  # fmt: skip
        return codes.to_dense()

    def forward(self, out: Float[Tensor, "n M D"], first: int, last: int) -> None:
        """Every mover's share V of rows ``first`` to ``last``."""
        if self.dense:
            f = self.rows(first, last)
            for m, loadings in enumerate(self.loadings_FM.T):
                out[:, m] = (f * loadings) @ self.decoder
            return
        from crosshead.maths import kernels_cpu

        c = self.codes
        inputs = (c.row_offsets, c.columns, c.values, self.loadings_FM, *(self.lists or ()), self.decoder, out)
        kernel = kernels_cpu.mix_rows if self.lists is None else kernels_cpu.mix_rows_by_movers
        on_ranges(kernel, balanced_ranges(c.row_offsets, first, last), *_numpy(inputs), first)

    def backward(self, grad: Float[Tensor, "n M D"], first: int, last: int, outputs: "_MixGradients") -> None:
        """Gradients of everything through rows ``first`` to ``last``, given those of their V."""
        if not self.dense:
            from crosshead.maths import kernels_cpu

            c = self.codes
            inputs = (c.row_offsets, c.columns, c.values, self.loadings_FM, *(self.lists or ()), self.decoder, grad)
            kernel = kernels_cpu.unmix_columns if self.lists is None else kernels_cpu.unmix_columns_by_movers
            ranges = balanced_ranges(c.by_column.offsets)
            on_ranges(kernel, ranges, *_numpy(inputs), first, last, *_numpy(outputs))
            return
        f = self.rows(first, last)
        grad_f = torch.zeros_like(f)
        for m, loadings in enumerate(self.loadings_FM.T):
            products = grad[:, m] @ self.decoder.T
            grad_f.addcmul_(products, loadings[None])
            outputs.loadings_FM[:, m] += (products * f).sum(0)
            outputs.decoder.addmm_((f * loadings).T, grad[:, m])
        part = slice(int(self.codes.row_offsets[first]), int(self.codes.row_offsets[last]))
        outputs.values[part] = grad_f[self.codes.rows[part] - first, self.codes.columns[part]]


class _MixGradients(NamedTuple):
    values: Tensor
    loadings_FM: Tensor
    decoder: Tensor


class _MixedDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, loadings: Tensor, decoder: Tensor, patterns: Tensor, structure: SparseCodes,
        engine: Engine, movers: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(values, loadings, decoder, patterns)
        ctx.structure, ctx.engine, ctx.movers = structure, engine, movers
        mix = _Mix.of(structure.with_values(values.detach()), loadings.detach(), decoder.detach(), movers, engine)
        n_contexts, _, n_positions, _ = patterns.shape
        shares_TMD = decoder.new_empty(n_positions, len(loadings), decoder.shape[1])
        y_BTD = decoder.new_empty(n_contexts, n_positions, decoder.shape[1])
        for b in range(n_contexts):
            mix.forward(shares_TMD, b * n_positions, (b + 1) * n_positions)
            _apply_patterns(patterns[b], shares_TMD, y_BTD[b])
        return y_BTD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_BTD = gradients[0].contiguous()
        values, loadings, decoder, patterns = ctx.saved_tensors
        mix = _Mix.of(ctx.structure.with_values(values), loadings, decoder, ctx.movers, ctx.engine)
        n_contexts, _, n_positions, _ = patterns.shape
        shares_TMD = decoder.new_empty(n_positions, len(loadings), decoder.shape[1])
        grads = _MixGradients(torch.empty_like(values), torch.zeros_like(mix.loadings_FM), torch.zeros_like(decoder))
        grad_patterns = torch.zeros_like(patterns) if ctx.needs_input_grad[3] else None
        for b in range(n_contexts):
            first, last = b * n_positions, (b + 1) * n_positions
            if grad_patterns is not None:
                mix.forward(shares_TMD, first, last)
                grad_patterns[b] = (grad_BTD[b] @ shares_TMD[:, 1:].permute(1, 2, 0)).tril()
            _transpose_patterns(patterns[b], grad_BTD[b], shares_TMD)
            mix.backward(shares_TMD, first, last, grads)
        grad_loadings = grads.loadings_FM.T
        if ctx.movers is not None:
            grad_loadings = grad_loadings * ctx.movers
        return grads.values, grad_loadings, grads.decoder, grad_patterns, None, None, None


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


# ---- dense or sparse ----


def _dense(codes: SparseCodes, n_movers: int, n_moves: int, width: int, engine: Engine) -> bool:
    """Whether to multiply dense matrices; always where there are no kernels."""
    if codes.columns.device.type != "cpu":
        return True
    return engine.prefers_dense(codes.n_rows, codes.n_features, n_movers, n_moves, width)


def _numpy(tensors: Any) -> list[Any]:
    return [tensor.detach().numpy() for tensor in tensors]
