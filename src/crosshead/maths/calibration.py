"""What dense and sparse multiply-adds cost on this machine."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Costs, Engine
from crosshead.maths.sparse import decode, mixed_decode

__all__ = ["measure_costs"]


def measure_costs(
    *, n_contexts: int = 4, n_positions: int = 64, n_features: int = 2048, n_heads: int = 9, width: int = 576,
    active: int = 128, repeats: int = 5,
) -> Costs:  # fmt: skip
    """Time both forms of both products, forward and backward, at one shape; medians in nanoseconds.

    ``active`` is the mean number of active features per row. The dense form's time has two parts, per multiply-add and
    per entry of the [N, F] matrix; two widths tell them apart.
    """
    generator = torch.Generator().manual_seed(0)
    n_rows, n_movers = n_contexts * n_positions, n_heads + 1
    mask = torch.rand(n_rows, n_features, generator=generator) < active / n_features
    codes = SparseCodes.from_dense(torch.rand(n_rows, n_features, generator=generator) * mask)
    n_nonzero = len(codes.columns)
    patterns = torch.zeros(n_contexts, n_heads, n_positions, n_positions)
    loadings = torch.rand(n_movers, n_features, generator=generator)

    def seconds(form: str, columns: int, mixed: bool) -> float:
        decoder = torch.rand(n_features, columns, generator=generator)
        engine = Engine(form=form)  # pyright: ignore[reportArgumentType]
        if mixed:
            return _median(lambda v, d: mixed_decode(codes.with_values(v), loadings, d, patterns, engine),
                           codes.values, decoder, repeats)  # fmt: skip
        return _median(lambda v, d: decode(codes.with_values(v), d, engine), codes.values, decoder, repeats)

    wide, narrow = seconds("dense", width, mixed=True), seconds("dense", width // 4, mixed=True)
    entries = n_movers * n_rows * n_features
    dense = max(wide - narrow, 0.1 * wide) / (entries * (width - width // 4))
    return Costs(
        dense=_rounded(dense),
        entry=_rounded(max(narrow / entries - dense * (width // 4), 0.01 * dense)),
        plain=_rounded(seconds("sparse", width, mixed=False) / (n_nonzero * width)),
        moved=_rounded(seconds("sparse", width, mixed=True) / (n_movers * n_nonzero * width)),
    )


def _median(product: Callable[[Tensor, Tensor], Tensor], values: Tensor, decoder: Tensor, repeats: int) -> float:
    """Seconds of a product and its gradients; the first call, which compiles, does not count."""
    leaves = [values.detach().clone().requires_grad_(), decoder.clone().requires_grad_()]
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        torch.autograd.grad(product(*leaves).sum(), leaves)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _rounded(seconds: float) -> float:
    return float(f"{seconds * 1e9:.3g}")
