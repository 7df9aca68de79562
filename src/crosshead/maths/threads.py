"""Run a compiled kernel on several ranges at once, one thread each.

As many threads as torch uses; the caller is one of them and waits for the others.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

__all__ = ["balanced_ranges", "even_ranges", "on_ranges"]

Ranges = list[tuple[int, int]]


def even_ranges(size: int) -> Ranges:
    """0 to ``size`` in one stretch per thread."""
    n_threads = max(1, min(torch.get_num_threads(), size))
    edges = [size * i // n_threads for i in range(n_threads + 1)]
    return list(pairwise(edges))


def balanced_ranges(offsets: Int[Tensor, " size+1"], first: int = 0, last: int | None = None) -> Ranges:
    """``first`` to ``last`` in one stretch per thread, with about as many non-zeros in each.

    ``offsets``: entry i is the number of non-zeros before i. Every item counts for one more, so that empty ones are
    shared out too.
    """
    last = len(offsets) - 1 if last is None else last
    work = offsets[first : last + 1].numpy() + np.arange(last + 1 - first)
    n_threads = max(1, min(torch.get_num_threads(), last - first))
    targets = work[0] + (work[-1] - work[0]) * np.arange(1, n_threads) / n_threads
    edges = [first, *(int(i) for i in first + np.searchsorted(work, targets)), last]
    return [(a, b) for a, b in pairwise(edges) if b > a]


def on_ranges(kernel: Callable[..., None], ranges: Ranges, *arguments: Any) -> None:
    """Call ``kernel(*arguments, first, last)`` for every range; return when all have ended."""
    if len(ranges) <= 1:
        for first, last in ranges:
            kernel(*arguments, first, last)
        return
    futures = [_pool(len(ranges) - 1).submit(kernel, *arguments, first, last) for first, last in ranges[1:]]
    kernel(*arguments, *ranges[0])
    for future in futures:
        future.result()


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="crosshead")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
