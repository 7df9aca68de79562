"""Peak memory and time of a training step of attention replacement layers, each in a process of its own.

    python -m benchmarks.replacement_memory [--heads 9 256 1024] [--head-dim 4]

A step is loss and gradients on 4 contexts of 256 positions of width 576. The peak is the growth of resident memory over
weights and inputs, gradients included (Linux). Beside it stand the [B, M, T, T] patterns that are never held.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from crosshead.attention.registry import build, config_class
from crosshead.dictionaries.base import Batch, ModelDims, Site

CONTEXTS, POSITIONS, WIDTH = 4, 256, 576
DIMS = ModelDims(d_model=WIDTH, n_heads=9, n_kv_heads=3, head_dim=64, n_layers=1)
_STEPS = 3


def main() -> None:
    """Print one line per number of heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[9, 64, 256, 1024])
    parser.add_argument("--head-dim", type=int, default=4)
    parser.add_argument("--patterns-mib", type=float, default=32.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", type=int, help="measure one number of heads in this process, print JSON")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(_measure(options.measure, options.head_dim, options.patterns_mib, options.threads)))
        return
    print(f"{'heads':>6} {'e':>3} {'parameters MiB':>15} {'peak of a step MiB':>19} {'patterns MiB':>13} {'step s':>7}")
    for heads in options.heads:
        arguments = {"measure": heads, "head-dim": options.head_dim, "patterns-mib": options.patterns_mib,
                     "threads": options.threads}  # fmt: skip
        command = [sys.executable, "-m", "benchmarks.replacement_memory"]
        command += [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        patterns = CONTEXTS * heads * POSITIONS**2 * 4 / 2**20
        print(f"{heads:>6} {options.head_dim:>3} {found['parameters']:>15.0f} {found['peak']:>19.0f} {patterns:>13.0f} "
              f"{found['seconds']:>7.2f}")  # fmt: skip


def _measure(heads: int, head_dim: int, patterns_mib: float, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    config = config_class("replacement").model_validate({
        "kind": "replacement", "layers": [0], "features": heads, "head_dim": head_dim, "patterns_mib": patterns_mib,
    })  # fmt: skip
    module = build(config, DIMS).train()
    generator = torch.Generator().manual_seed(0)
    sites = {Site(0, name): torch.randn(CONTEXTS, POSITIONS, WIDTH, generator=generator)
             for name in ("resid_in", "attn_out")}  # fmt: skip
    mask = torch.ones(CONTEXTS, POSITIONS, dtype=torch.bool)
    mask[:, 0] = False
    batch = Batch(sites, mask, torch.zeros(CONTEXTS, POSITIONS, dtype=torch.long))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    peak, seconds = 0.0, float("inf")
    for step in range(_STEPS + 1):
        for parameter in module.parameters():
            parameter.grad = None
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, start = _status("VmRSS"), time.perf_counter()
        module.loss(batch, 1.0).total.backward()
        seconds = min(seconds, time.perf_counter() - start)
        if step:  # the first allocates what the process keeps
            peak = max(peak, _status("VmHWM") - before)
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    return {"parameters": parameters / 2**20, "peak": peak / 2**20, "seconds": seconds}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
