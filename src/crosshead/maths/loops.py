"""Compiled loops over the non-zeros of sparse codes, for the CPU.

Shape legend: N rows, F features, Z non-zeros, M movers, D row width of a dense table, C columns of a tile.

Every kernel works on a range ``first`` to ``last`` of rows or features and writes nothing outside it, so threads share
nothing, and no sum depends on the number of threads. Inner loops run along D in memory order; four non-zeros (or
movers) share one pass over a row, because a pass costs its loads and stores, not its multiplications.
"""

import numba
import numpy as np

# Sums may be reordered into vectors. Nothing may assume that a number is finite: training looks for those that are not.
_compiled = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy",
                       fastmath={"contract", "reassoc", "nsz"})  # fmt: skip

__all__ = [
    "column_order",
    "count_above",
    "decode_columns",
    "fill_above",
    "interleave_patterns",
    "keep_largest",
    "mix_rows",
    "mix_rows_by_movers",
    "offer_rows",
    "place_rows",
    "sort_rows",
    "unmix_columns",
    "unmix_columns_by_movers",
    "weighted_columns",
    "weighted_rows",
]


# ---- the encoder's product, tile by tile ----


# These two must agree on every entry, so nothing may be reordered in them.
_strict = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy")


@_strict
def count_above(pre, bias, scale, level, mask, counts, first, last):
    """counts[n] = entries of row n of a tile [N, C] with (pre + bias) * scale > level."""
    for n in range(first, last):
        count = 0
        if mask[n]:
            for c in range(pre.shape[1]):
                if (pre[n, c] + bias[c]) * scale[c] > level[c]:
                    count += 1
        counts[n] = count


@_strict
def fill_above(pre, bias, scale, level, mask, offsets, base, columns, values, first, last):
    """Write those entries' columns (counted from ``base``) and pre-activations, row by row."""
    for n in range(first, last):
        at = offsets[n]
        if mask[n] and offsets[n + 1] > at:
            for c in range(pre.shape[1]):
                value = pre[n, c] + bias[c]
                if value * scale[c] > level[c] and at < offsets[n + 1]:
                    columns[at] = base + c
                    values[at] = value
                    at += 1


@_compiled
def place_rows(tile_offsets, tile_columns, tile_values, starts, columns, values, first, last):
    """Copy every row's entries of one tile to where that row's stretch of this tile starts."""
    for n in range(first, last):
        to = starts[n]
        for j in range(tile_offsets[n], tile_offsets[n + 1]):
            columns[to] = tile_columns[j]
            values[to] = tile_values[j]
            to += 1


@_compiled
def _before(score, column, other_score, other_column):
    """Whether an entry leaves a heap before another: smaller, or as large and of a later column."""
    return score < other_score or (score == other_score and column > other_column)


@_compiled
def _sink(scores, columns, values, size, i):
    """Restore the heap below i."""
    while True:
        child = 2 * i + 1
        if child >= size:
            return
        if child + 1 < size and _before(scores[child + 1], columns[child + 1], scores[child], columns[child]):
            child += 1
        if not _before(scores[child], columns[child], scores[i], columns[i]):
            return
        scores[i], scores[child] = scores[child], scores[i]
        columns[i], columns[child] = columns[child], columns[i]
        values[i], values[child] = values[child], values[i]
        i = child


@_compiled
def offer_rows(pre, bias, scale, mask, base, sizes, scores, columns, values, first, last):
    """Let every row keep the best positive (pre + bias) * scale seen so far, as many as ``scores`` has columns."""
    k = scores.shape[1]
    for n in range(first, last):
        if not mask[n]:
            continue
        size = sizes[n]
        floor = scores[n, 0] if size == k else 0.0
        for c in range(pre.shape[1]):
            value = pre[n, c] + bias[c]
            score = value * scale[c]
            if score > floor:
                at = size if size < k else 0
                scores[n, at], columns[n, at], values[n, at] = score, base + c, value
                if size < k:
                    size += 1
                    if size == k:
                        for i in range(k // 2 - 1, -1, -1):
                            _sink(scores[n], columns[n], values[n], k, i)
                else:
                    _sink(scores[n], columns[n], values[n], k, 0)
                if size == k:
                    floor = scores[n, 0]
        sizes[n] = size


@_compiled
def sort_rows(offsets, kept_columns, kept_values, columns, values, first, last):
    """Write every row's kept entries in the order of their columns."""
    for n in range(first, last):
        size = offsets[n + 1] - offsets[n]
        order = np.argsort(kept_columns[n, :size])
        for i in range(size):
            columns[offsets[n] + i] = kept_columns[n, order[i]]
            values[offsets[n] + i] = kept_values[n, order[i]]


@_compiled
def keep_largest(row_offsets, columns, values, scale, least, n_ties, kept_offsets, kept_columns, kept_values):
    """Entries whose score exceeds ``least``, and the first ``n_ties`` of those that equal it."""
    at = 0
    for n in range(len(row_offsets) - 1):
        kept_offsets[n] = at
        for j in range(row_offsets[n], row_offsets[n + 1]):
            score = values[j] * scale[columns[j]]
            if score > least or (score == least and n_ties > 0):
                if score == least:
                    n_ties -= 1
                kept_columns[at] = columns[j]
                kept_values[at] = values[j]
                at += 1
    kept_offsets[len(row_offsets) - 1] = at


# ---- patterns ----


@_compiled
def interleave_patterns(patterns, block, out, first, last):
    """out[t, s, m] = [t = s] for m = 0, pattern_m-1(t, s) else; zero after t, up to the end of t's block."""
    n_heads, n_positions, _ = patterns.shape
    for t in range(first, last):
        end = min((t // block + 1) * block, n_positions)
        for s in range(t):
            out[t, s, 0] = 0
        out[t, t, 0] = 1
        for h in range(n_heads):
            for s in range(t + 1):
                out[t, s, h + 1] = patterns[h, t, s]
        for s in range(t + 1, end):
            for m in range(n_heads + 1):
                out[t, s, m] = 0


# ---- structure ----


@_compiled
def column_order(row_offsets, columns, column_offsets, order, rows):
    """Entries by column, then row: their indices, and their rows. ``column_offsets`` [F+1] is filled in."""
    column_offsets[:] = 0
    for j in range(len(columns)):
        column_offsets[columns[j] + 1] += 1
    for i in range(len(column_offsets) - 1):
        column_offsets[i + 1] += column_offsets[i]
    cursor = column_offsets[:-1].copy()
    for n in range(len(row_offsets) - 1):
        for j in range(row_offsets[n], row_offsets[n + 1]):
            at = cursor[columns[j]]
            order[at] = j
            rows[at] = n
            cursor[columns[j]] = at + 1


# ---- products without movers ----


@_compiled
def weighted_rows(row_offsets, columns, values, table, out, first, last):
    """out[n] = sum over the row's non-zeros j of values[j] * table[column_j]."""
    width = table.shape[1]
    for n in range(first, last):
        out[n, :] = 0
        j, end = row_offsets[n], row_offsets[n + 1]
        while j + 4 <= end:
            a, b, c, d = columns[j], columns[j + 1], columns[j + 2], columns[j + 3]
            va, vb, vc, vd = values[j], values[j + 1], values[j + 2], values[j + 3]
            for i in range(width):
                out[n, i] += va * table[a, i] + vb * table[b, i] + vc * table[c, i] + vd * table[d, i]
            j += 4
        while j < end:
            a, va = columns[j], values[j]
            for i in range(width):
                out[n, i] += va * table[a, i]
            j += 1


@_compiled
def weighted_columns(column_offsets, order, rows, weights, table, share, common, out, first, last):
    """out[i] = share[i] * common + sum over the column's non-zeros j of weights[j] * table[row_j]."""
    width = table.shape[1]
    for f in range(first, last):
        for i in range(width):
            out[f, i] = share[f] * common[i]
        j, end = column_offsets[f], column_offsets[f + 1]
        while j + 4 <= end:
            a, b, c, d = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            wa, wb, wc, wd = weights[order[j]], weights[order[j + 1]], weights[order[j + 2]], weights[order[j + 3]]
            for i in range(width):
                out[f, i] += wa * table[a, i] + wb * table[b, i] + wc * table[c, i] + wd * table[d, i]
            j += 4
        while j < end:
            a, wa = rows[j], weights[order[j]]
            for i in range(width):
                out[f, i] += wa * table[a, i]
            j += 1


@_compiled
def decode_columns(column_offsets, order, rows, values, grad, decoder, grad_values, grad_decoder, first, last):
    """Both gradients of ``weighted_rows``: grad[row_j] . decoder[column_j], and sum_j values[j] * grad[row_j]."""
    width = decoder.shape[1]
    zero = grad.dtype.type(0)
    for f in range(first, last):
        grad_decoder[f, :] = 0
        j, end = column_offsets[f], column_offsets[f + 1]
        while j + 4 <= end:
            a, b, c, d = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
            oa, ob, oc, od = order[j], order[j + 1], order[j + 2], order[j + 3]
            va, vb, vc, vd = values[oa], values[ob], values[oc], values[od]
            sa = sb = sc = sd = zero
            for i in range(width):
                ga, gb, gc, gd, row = grad[a, i], grad[b, i], grad[c, i], grad[d, i], decoder[f, i]
                sa += ga * row
                sb += gb * row
                sc += gc * row
                sd += gd * row
                grad_decoder[f, i] += va * ga + vb * gb + vc * gc + vd * gd
            grad_values[oa], grad_values[ob], grad_values[oc], grad_values[od] = sa, sb, sc, sd
            j += 4
        while j < end:
            a, oa = rows[j], order[j]
            va, sa = values[oa], zero
            for i in range(width):
                sa += grad[a, i] * decoder[f, i]
                grad_decoder[f, i] += va * grad[a, i]
            grad_values[oa] = sa
            j += 1


# ---- products with movers ----


@_compiled
def mix_rows(row_offsets, columns, values, loadings, decoder, out, base, first, last):
    """out[n - base, m] = sum over row n's non-zeros j of loadings[column_j, m] * values[j] * decoder[column_j]."""
    movers, width = loadings.shape[1], decoder.shape[1]
    for n in range(first, last):
        out[n - base] = 0
        j, end = row_offsets[n], row_offsets[n + 1]
        while j + 4 <= end:
            a, b, c, d = columns[j], columns[j + 1], columns[j + 2], columns[j + 3]
            for m in range(movers):
                wa, wb = loadings[a, m] * values[j], loadings[b, m] * values[j + 1]
                wc, wd = loadings[c, m] * values[j + 2], loadings[d, m] * values[j + 3]
                for i in range(width):
                    out[n - base, m, i] += (
                        wa * decoder[a, i] + wb * decoder[b, i] + wc * decoder[c, i] + wd * decoder[d, i]
                    )
            j += 4
        while j < end:
            a = columns[j]
            for m in range(movers):
                wa = loadings[a, m] * values[j]
                for i in range(width):
                    out[n - base, m, i] += wa * decoder[a, i]
            j += 1


@_compiled
def mix_rows_by_movers(
    row_offsets, columns, values, loadings, mover_offsets, mover_list, decoder, out, base, first, last
):
    """``mix_rows`` with every feature's listed movers only."""
    width = decoder.shape[1]
    for n in range(first, last):
        out[n - base] = 0
        for j in range(row_offsets[n], row_offsets[n + 1]):
            a = columns[j]
            for at in range(mover_offsets[a], mover_offsets[a + 1]):
                m = mover_list[at]
                weight = loadings[a, m] * values[j]
                for i in range(width):
                    out[n - base, m, i] += weight * decoder[a, i]


@_compiled
def _stretch(columns, start, end, first, last):
    """The part of a row's ascending columns that lies in first to last."""
    low = start + np.searchsorted(columns[start:end], first)
    return low, low + np.searchsorted(columns[low:end], last)


@_compiled
def unmix_columns(
    row_offsets, columns, values, loadings, decoder, grad, base, until,
    grad_values, grad_loadings, grad_decoder, first, last,
):  # fmt: skip
    """All gradients of ``mix_rows`` for rows ``base`` to ``until``, given those of its result [rows, M, D].

    grad_loadings and grad_decoder are added to, grad_values is written. A row's gradients stay in the fastest cache
    while its non-zeros pass; every active decoder row is read once for all movers.
    """
    movers, width = loadings.shape[1], decoder.shape[1]
    zero = decoder.dtype.type(0)
    for n in range(base, until):
        low, high = _stretch(columns, row_offsets[n], row_offsets[n + 1], first, last)
        for j in range(low, high):
            f, value = columns[j], values[j]
            total = zero
            m = 0
            while m + 4 <= movers:
                la, lb, lc, ld = loadings[f, m], loadings[f, m + 1], loadings[f, m + 2], loadings[f, m + 3]
                wa, wb, wc, wd = la * value, lb * value, lc * value, ld * value
                sa = sb = sc = sd = zero
                for i in range(width):
                    ga, gb = grad[n - base, m, i], grad[n - base, m + 1, i]
                    gc, gd = grad[n - base, m + 2, i], grad[n - base, m + 3, i]
                    row = decoder[f, i]
                    sa += ga * row
                    sb += gb * row
                    sc += gc * row
                    sd += gd * row
                    grad_decoder[f, i] += wa * ga + wb * gb + wc * gc + wd * gd
                grad_loadings[f, m] += value * sa
                grad_loadings[f, m + 1] += value * sb
                grad_loadings[f, m + 2] += value * sc
                grad_loadings[f, m + 3] += value * sd
                total += la * sa + lb * sb + lc * sc + ld * sd
                m += 4
            while m < movers:
                weight, sa = loadings[f, m] * value, zero
                for i in range(width):
                    sa += grad[n - base, m, i] * decoder[f, i]
                    grad_decoder[f, i] += weight * grad[n - base, m, i]
                grad_loadings[f, m] += value * sa
                total += loadings[f, m] * sa
                m += 1
            grad_values[j] = total


@_compiled
def unmix_columns_by_movers(
    row_offsets, columns, values, loadings, mover_offsets, mover_list, decoder, grad, base, until,
    grad_values, grad_loadings, grad_decoder, first, last,
):  # fmt: skip
    """``unmix_columns`` with every feature's listed movers only; other loadings get no gradient."""
    width = decoder.shape[1]
    zero = decoder.dtype.type(0)
    for n in range(base, until):
        low, high = _stretch(columns, row_offsets[n], row_offsets[n + 1], first, last)
        for j in range(low, high):
            f, value = columns[j], values[j]
            total = zero
            for at in range(mover_offsets[f], mover_offsets[f + 1]):
                m = mover_list[at]
                weight, product = loadings[f, m] * value, zero
                for i in range(width):
                    product += grad[n - base, m, i] * decoder[f, i]
                    grad_decoder[f, i] += weight * grad[n - base, m, i]
                grad_loadings[f, m] += value * product
                total += loadings[f, m] * product
            grad_values[j] = total
