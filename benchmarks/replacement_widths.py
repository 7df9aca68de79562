"""How close replacement layers of many or few, wide or narrow heads come in equal steps, each in a process of its own.

    python -m benchmarks.replacement_widths [--layers 9x64 128x30] [--start random] [--rate 2e-3] [--steps 120]

Trained and evaluated on the activations of a profile that has been harvested (``dvc repro harvest``; other profiles by
--data); the peak is that of the whole process, the time beside whatever else the machine does. 1024x30 takes 20
minutes and 4.3 GB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from crosshead.activations.batches import Batches
from crosshead.activations.cache import ActivationCache
from crosshead.attention.registry import build, config_class
from crosshead.io.files import read_json
from crosshead.training.fit import TrainingConfig, fit
from flows._attention_runs import take_attention_


def main() -> None:
    """Print one line per layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["9x64", "64x30", "128x30"], help="heads x width")
    parser.add_argument("--start", choices=("random", "base_qk"), default="random")
    parser.add_argument("--rate", type=float, nargs="+", default=[2e-3, 4e-3], help="learning rates, all are tried")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--data", type=Path, default=Path("data/laptop"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", help="measure one layer in this process, print JSON")
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(_measure(options.measure, options)))
        return
    print(f"{'heads x width':>14} {'start':>8} {'rate':>8} {'normalised MSE':>15} {'peak MiB':>9} {'seconds':>8}")
    for layer in options.layers:
        for rate in options.rate:
            command = [sys.executable, "-m", "benchmarks.replacement_widths", "--measure", layer, "--rate", str(rate),
                       "--start", options.start, "--steps", str(options.steps), "--data", str(options.data),
                       "--threads", str(options.threads)]  # fmt: skip
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            print(f"{layer:>14} {options.start:>8} {rate:>8g} {found['normalised_mse']:>15.4f} {found['peak']:>9,.0f} "
                  f"{found['seconds']:>8.0f}", flush=True)  # fmt: skip


def _measure(layer: str, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    heads, width = (int(part) for part in layer.split("x"))
    cache = ActivationCache.open(options.data / "cache")
    first = read_json(options.data / "survey" / "layers.json")["first"]
    module = build(config_class("replacement").model_validate({
        "kind": "replacement", "layers": [first], "features": heads, "head_dim": width, "start": options.start,
    }), cache.dims)  # fmt: skip
    take_attention_(module, cache)
    schedule = TrainingConfig(steps=options.steps, learning_rate=options.rate[0], warmup_steps=12)
    train = Batches(cache, "train", (*module.sites, *module.start_sites), schedule.contexts_per_batch, 0)
    heldout = Batches(cache, "heldout", module.sites, schedule.contexts_per_batch, 0)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        fit(module, train, heldout, cache.weights(), schedule, seed=0, work=Path(work), identity=layer)
    seconds, error, power = time.perf_counter() - begin, 0.0, 0.0
    with torch.no_grad():
        for batch in heldout.all():
            target = module.target(batch)[batch.mask]
            error += float((target - module.decode(module.encode(batch), batch)[batch.mask]).square().sum())
            power += float(target.square().sum())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"normalised_mse": error / power, "peak": peak, "seconds": seconds}


if __name__ == "__main__":
    main()
