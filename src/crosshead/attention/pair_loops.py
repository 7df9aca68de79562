"""Compiled loops over pairs of a query-side and a key-side non-zero of the same channel, for the CPU.

Shape legend: B contexts, T positions, N = B*T rows, C channels, G heads, D distances (T, or 1 where the kernel does not
depend on the distance).

A pair counts where both lie in one context and the key is not after the query. Every kernel writes nothing outside its
range, so threads share nothing, and no sum depends on the number of threads.
"""

import numba

# Sums may be reordered into vectors. Nothing may assume that a number is finite: training looks for those that are not.
_compiled = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy",
                       fastmath={"contract", "reassoc", "nsz"})  # fmt: skip

__all__ = ["pair_rows", "unpair_channels"]


@_compiled
def _first_at(rows, low, high, row):
    """Index of the first of the ascending ``rows[low:high]`` that is not below ``row``."""
    while low < high:
        middle = (low + high) // 2
        if rows[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@_compiled
def pair_rows(offsets, columns, values, key_offsets, key_rows, key_values, kernel, length, out, first, last):
    """out[n, s, g] = sum over channels i of u_i(t) v_i(s) kernel[i, t - s, g], n = context * length + t.

    Queries by row (``offsets, columns, values``), keys by channel.
    """
    n_heads, by_distance = kernel.shape[2], kernel.shape[1] > 1
    for n in range(first, last):
        begin = n - n % length
        for j in range(offsets[n], offsets[n + 1]):
            i, u = columns[j], values[j]
            at = _first_at(key_rows, key_offsets[i], key_offsets[i + 1], begin)
            while at < key_offsets[i + 1] and key_rows[at] <= n:
                row = key_rows[at]
                distance = n - row if by_distance else 0
                product = u * key_values[at]
                if n_heads == 1:
                    out[n, row - begin, 0] += product * kernel[i, distance, 0]
                else:
                    for g in range(n_heads):
                        out[n, row - begin, g] += product * kernel[i, distance, g]
                at += 1


@_compiled
def unpair_channels(
    query_offsets, query_rows, query_values, key_offsets, key_rows, key_values, kernel, length, grad, grad_query,
    grad_key, grad_kernel, first, last,
):  # fmt: skip
    """Gradients of everything through channels ``first`` to ``last``, given ``grad`` of ``out`` above.

    Queries and keys by channel; gradients of values in the same order. They are added to what is there.
    """
    n_heads, by_distance = kernel.shape[2], kernel.shape[1] > 1
    for i in range(first, last):
        low = key_offsets[i]
        for j in range(query_offsets[i], query_offsets[i + 1]):
            n, u = query_rows[j], query_values[j]
            begin = n - n % length
            low = _first_at(key_rows, low, key_offsets[i + 1], begin)
            at, total = low, grad_query[j]
            while at < key_offsets[i + 1] and key_rows[at] <= n:
                row, v = key_rows[at], key_values[at]
                distance = n - row if by_distance else 0
                through = grad[n, row - begin, 0] * kernel[i, distance, 0]
                grad_kernel[i, distance, 0] += grad[n, row - begin, 0] * u * v
                for g in range(1, n_heads):
                    through += grad[n, row - begin, g] * kernel[i, distance, g]
                    grad_kernel[i, distance, g] += grad[n, row - begin, g] * u * v
                total += through * v
                grad_key[at] += through * u
                at += 1
            grad_query[j] = total
