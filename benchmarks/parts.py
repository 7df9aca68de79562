"""Where a multitoken transcoder's step spends its time: every part alone, beside a product of the encoder's shape."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.ours import at_l0, read_batch
from crosshead.activations.machine import Machine
from crosshead.dictionaries.base import Site
from crosshead.dictionaries.registry import load_dictionary
from crosshead.maths import on_cpu
from crosshead.maths.forms import MixGradients, Mixing, Product
from crosshead.maths.scan import largest_entries

__all__ = ["PARTS", "step_parts"]

PARTS = "parts of an mtc step"

ROWS, POSITIONS, L0 = 1024, 256, 64


def step_parts(inputs: Mapping[int, Path], pairs: int) -> Iterator[dict[str, Any]]:
    """Rows in the form of latest.json, one per part and number of features; the work is ``parts of an mtc step``.

    Elementwise work on [N, D], penalties and autograd itself are what is missing
    from a whole step.
    """
    Machine(device="cpu", threads=torch.get_num_threads()).prepare()
    for features, folder in inputs.items():
        parts = _parts(folder)
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for i in range(pairs + 1):
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                if i:
                    seconds[name].append(time.perf_counter() - start)
        products = seconds.pop("encoder product")
        for name, own in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(own, products, strict=True))
            yield {"work": PARTS, "implementation": f"ours/{name}",
                   "shape": {"N": ROWS, "T": POSITIONS, "d": 576, "F": features, "H": 10, "L0": L0},
                   "seconds_median": statistics.median(own), "peak_bytes": None, "ratio_to_encoder_product": ratio,
                   "ratio_to_ours": None, "pairs": pairs}  # fmt: skip


@torch.no_grad()
def _parts(folder: Path) -> dict[str, Callable[[], Any]]:
    batch, trained = read_batch(folder, ROWS, POSITIONS), load_dictionary(folder / "dictionary")
    module: Any = at_l0(trained, batch, "batch_topk", L0)
    x, mask = module.inputs(batch), batch.mask.flatten()
    product = Product(x, module.encoder.weight, module.encoder.bias, mask).detach()
    norms, engine, count = module.feature_norms(), module.engine, L0 * int(mask.sum())
    codes = largest_entries(product, norms, count, engine)
    mixing = Mixing.of(codes, module.loadings, module.decoder, None)
    patterns, n_contexts = batch[Site(module.layer, "pattern")], ROWS // POSITIONS
    shares = torch.randn(1, POSITIONS, len(module.loadings), module.decoder.shape[1])
    y, out = torch.randn(n_contexts, POSITIONS, module.decoder.shape[1]), torch.empty(ROWS, len(module.decoder))
    grads = MixGradients(
        torch.empty_like(codes.values), torch.zeros_like(mixing.loadings_FM), torch.zeros_like(mixing.decoder)
    )

    def by_context(work: Callable[[int, int, int], None]) -> Callable[[], None]:
        return lambda: [work(c, c * POSITIONS, (c + 1) * POSITIONS) for c in range(n_contexts)] and None

    def tiles() -> None:
        for _ in product.tiles(engine):
            pass

    return {
        "encoder product": lambda: torch.mm(x, product.weight.T, out=out),
        "tiled product": tiles,
        "tiled product and choice": lambda: largest_entries(product, norms, count, engine),
        "mix": by_context(lambda _c, a, b: on_cpu.mix(mixing, shares[0], a, b)),
        "patterns": by_context(lambda c, _a, _b: on_cpu.apply_patterns(patterns[c : c + 1], shares, y[c : c + 1])),
        "patterns, backward": by_context(
            lambda c, _a, _b: on_cpu.transpose_patterns(patterns[c : c + 1], y[c : c + 1], shares)
        ),
        "unmix": by_context(lambda _c, a, b: on_cpu.unmix(mixing, shares[0], a, b, grads)),
        "encoder gradient": lambda: on_cpu.weighted_columns(codes, x, norms, x[0]),
    }
