"""What dense and sparse multiply-adds cost on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from crosshead.maths.backends import backend
from crosshead.maths.codes import SparseCodes
from crosshead.maths.engine import Costs
from crosshead.maths.forms import MixGradients, Mixing

__all__ = ["measure_costs"]


def measure_costs(
    device: torch.device | str = "cpu", *, n_rows: int = 256, n_features: int = 2048, n_movers: int = 10,
    width: int = 576, active: int = 128, repeats: int = 5,
) -> Costs:  # fmt: skip
    """Time both forms of both products, forward and backward, at one shape; medians in nanoseconds.

    ``active`` is the mean number of active features per row. The dense form's time has two parts, per multiply-add and
    per entry of the [N, F] matrix; two widths tell them apart. Pattern products, equal in both forms, are left out.
    """
    device, generator = torch.device(device), torch.Generator().manual_seed(0)
    mask = torch.rand(n_rows, n_features, generator=generator) < active / n_features
    dense_codes = (torch.rand(n_rows, n_features, generator=generator) * mask).to(device)
    loadings = torch.rand(n_movers, n_features, generator=generator).to(device)

    def seconds(columns: int, *, dense: bool, movers: bool) -> float:
        decoder = torch.rand(n_features, columns, generator=generator).to(device)
        grad, products = torch.rand(n_rows, columns, device=device), backend(device, dense=dense)
        shares = torch.rand(n_rows, n_movers, columns, device=device)

        def without_movers(codes: SparseCodes) -> Any:
            return products.weighted_rows(codes, decoder), products.decode_gradients(codes, grad, decoder)

        def with_movers(codes: SparseCodes) -> None:
            mixing = Mixing.of(codes, loadings, decoder, None)
            products.mix(mixing, shares, 0, n_rows)
            into = MixGradients(torch.empty_like(codes.values), torch.zeros_like(mixing.loadings_FM),
                                torch.zeros_like(decoder))  # fmt: skip
            products.unmix(mixing, shares, 0, n_rows, into)

        return _median(with_movers if movers else without_movers, dense_codes, repeats)

    entries, n_nonzero = n_movers * n_rows * n_features, int(mask.sum())
    wide, narrow = (seconds(columns, dense=True, movers=True) for columns in (width, width // 4))
    dense = max(wide - narrow, 0.1 * wide) / (entries * (width - width // 4))
    return Costs(
        dense=_rounded(dense),
        entry=_rounded(max(narrow / entries - dense * (width // 4), 0.01 * dense)),
        plain=_rounded(seconds(width, dense=False, movers=False) / (n_nonzero * width)),
        moved=_rounded(seconds(width, dense=False, movers=True) / (n_movers * n_nonzero * width)),
    )


def _median(product: Callable[[SparseCodes], Any], dense_codes: torch.Tensor, repeats: int) -> float:
    """Seconds of a product and its gradients; the first call, which compiles, does not count."""
    times = []
    for _ in range(repeats + 1):
        codes = SparseCodes.from_dense(dense_codes)  # anew, because training sorts every batch's structure
        _synchronise(dense_codes)
        start = time.perf_counter()
        product(codes)
        _synchronise(dense_codes)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _synchronise(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)


def _rounded(seconds: float) -> float:
    return float(f"{seconds * 1e9:.3g}")
