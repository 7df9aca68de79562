r"""Scores as sums over pairs of sparse codes: one query-side and one key-side feature each, and a kernel of distance.

Shape legend: B contexts, T positions, N = B*T rows, C channels, G heads, Q basis functions of distance, D distances.

    S_g(t, s) = sum_i u_i(t) v_i(s) kappa_gi(t - s),    kappa_gi(d) = sum_q coefficients[i, g, q] basis[d, q]

On the CPU the kernel becomes a table [C, T, G] and the sum runs over the pairs of non-zeros, (T k)^2 / C of them for k
active channels a position: the price does not depend on the number of basis functions. Elsewhere, and where the engine
asks for dense products, S = sum_q basis_q(t - s) * (U diag(coefficients_q) V^T) for each head. Neither builds a
[T, T, C] tensor.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Engine
from crosshead.maths.threads import balanced_ranges, on_ranges

__all__ = ["kernel_table", "pair_scores"]


def kernel_table(coefficients: Float[Tensor, "C G Q"], basis: Float[Tensor, "D Q"]) -> Float[Tensor, "C D G"]:
    """Kappa at every distance."""
    return torch.einsum("cgq,dq->cdg", coefficients, basis)


def pair_scores(
    query: SparseCodes,
    key: SparseCodes,
    coefficients: Float[Tensor, "C G Q"],
    basis: Float[Tensor, "D Q"],
    n_positions: int,
    engine: Engine | None = None,
) -> Float[Tensor, "B G T T"]:
    """S of every context, zero above the diagonal; differentiable in codes and coefficients.

    ``basis`` has a row per distance from 0 to T - 1, or one row where nothing depends on the distance. ValueError for
    codes that fit neither each other nor whole contexts, or a basis that is too short.
    """
    if query.n_rows != key.n_rows or query.n_rows % n_positions or query.n_features != key.n_features:
        raise ValueError(f"got codes of {query.n_rows} x {query.n_features} and {key.n_rows} x {key.n_features}; both "
                         f"must have the same channels and whole contexts of {n_positions} positions")  # fmt: skip
    if len(basis) not in (1, n_positions) and len(basis) < n_positions:
        raise ValueError(f"the kernel knows {len(basis)} distances, the context has {n_positions} positions; use "
                         "contexts no longer than those it was made for")  # fmt: skip
    basis = basis if len(basis) == 1 else basis[:n_positions]
    engine = engine or Engine()
    if query.values.device.type != "cpu" or engine.form == "dense":
        return _dense_scores(query, key, coefficients, basis, n_positions)
    kernel = kernel_table(coefficients, basis)
    flat = _PairScores.apply(query.values, key.values, kernel, query, key, n_positions)
    n_heads = coefficients.shape[1]
    return flat.view(-1, n_positions, n_positions, n_heads).permute(0, 3, 1, 2)


def _dense_scores(
    query: SparseCodes, key: SparseCodes, coefficients: Tensor, basis: Tensor, n_positions: int
) -> Float[Tensor, "B G T T"]:
    u_BTC, v_BTC = (codes.to_dense().view(-1, n_positions, codes.n_features) for codes in (query, key))
    place = torch.arange(n_positions, device=u_BTC.device)
    distance = (place[:, None] - place).clamp(min=0) if len(basis) > 1 else torch.zeros_like(place[:, None] - place)
    per_head = []
    for g in range(coefficients.shape[1]):
        arguments = (u_BTC, v_BTC, coefficients[:, g], basis, distance)
        # Computed again in the backward pass: a [B, T, C] of every basis function would have to be kept.
        per_head.append(checkpoint(_head_scores, *arguments, use_reentrant=False, preserve_rng_state=False)
                        if torch.is_grad_enabled() else _head_scores(*arguments))  # fmt: skip
    return torch.stack(per_head, dim=1)


def _head_scores(
    u_BTC: Tensor, v_BTC: Tensor, coefficients_CQ: Tensor, basis: Tensor, distance: Tensor
) -> Float[Tensor, "B T T"]:
    scores = u_BTC.new_zeros(len(u_BTC), len(distance), len(distance))
    for q in range(coefficients_CQ.shape[1]):
        scores = scores + ((u_BTC * coefficients_CQ[:, q]) @ v_BTC.transpose(1, 2)) * basis[distance, q]
    return scores.tril()


class _PairScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, kernel: Tensor, query: SparseCodes, key: SparseCodes, n_positions: int
    ) -> Float[Tensor, "N T G"]:
        from crosshead.attention.pair_loops import pair_rows

        u, v, kernel = u.detach().contiguous(), v.detach().contiguous(), kernel.detach().contiguous()
        ctx.save_for_backward(u, v, kernel)
        ctx.codes, ctx.n_positions = (query, key), n_positions
        out = u.new_zeros(query.n_rows, n_positions, kernel.shape[2])
        order = key.by_column
        arguments = (query.row_offsets, query.columns, u, order.offsets, order.rows, v[order.entries], kernel)
        on_ranges(pair_rows, balanced_ranges(query.row_offsets), *(a.numpy() for a in arguments), n_positions,
                  out.numpy())  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        from crosshead.attention.pair_loops import unpair_channels

        u, v, kernel = ctx.saved_tensors
        queries, keys = (codes.by_column for codes in ctx.codes)
        grad = gradients[0].contiguous()
        grad_u, grad_v, grad_kernel = torch.zeros_like(u), torch.zeros_like(v), torch.zeros_like(kernel)
        arguments = (
            queries.offsets,
            queries.rows,
            u[queries.entries],
            keys.offsets,
            keys.rows,
            v[keys.entries],
            kernel,
        )
        on_ranges(unpair_channels, balanced_ranges(queries.offsets), *(a.numpy() for a in arguments), ctx.n_positions,
                  grad.numpy(), grad_u.numpy(), grad_v.numpy(), grad_kernel.numpy())  # fmt: skip
        by_entry_u, by_entry_v = torch.empty_like(u), torch.empty_like(v)
        by_entry_u[queries.entries], by_entry_v[keys.entries] = grad_u, grad_v
        return by_entry_u, by_entry_v, grad_kernel, None, None, None
