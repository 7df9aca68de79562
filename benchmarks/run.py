"""Time our steps beside the peers' on this machine: ``make bench``.

    python -m benchmarks.run [--data data/laptop] [--pairs 7] [--only PATTERN] [--quick]

Implementations of one work take turns, one step each, and every turn begins with a preallocated product of the
encoder's shape in the same process: a machine that slows down slows all of them. Ratios are medians of the ratios of
neighbouring turns. Writes latest.json, a dated table and plots beside this file.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.prepare import L0S, prepare
from benchmarks.table import write_tables
from benchmarks.whole import whole_rows

HOME = Path(__file__).resolve().parent
ROOT = HOME.parent
POSITIONS, WIDTH, MOVERS = 256, 576, 10
FEATURES = (2048, 8192, 32768)
PEER_STEPS = {
    "l1": ("ours:l1", "ours:l1-pre", "peers:saelens/standard", "peers:dictionary_learning/standard"),
    "topk": ("ours:topk", "peers:sparsify/topk", "peers:saelens/topk", "peers:dictionary_learning/topk"),
    "jumprelu": ("ours:jumprelu", "peers:saelens/jumprelu"),
}
DENSE = re.compile("standard|jumprelu|/(feature|decoder)-side")


@dataclass(frozen=True)
class Work:
    """Implementations that do the same thing on the same inputs. The first is ours, the one others are divided by."""

    name: str
    implementations: tuple[str, ...]
    kind: str
    shape: dict[str, int]
    optimiser: bool = False


@dataclass
class Side:
    """A worker process of one environment."""

    name: str
    python: Path
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive", "WANDB_MODE": "disabled"}
        self.process = subprocess.Popen(
            [str(self.python), "-m", "benchmarks.worker", self.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(HOME / f"{self.name}.log").open("w"), text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a request, wait for the answer."""
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the worker ended; see benchmarks/{self.name}.log"}


def works() -> Iterator[Work]:
    """Everything that is timed by turns."""
    for features in FEATURES:
        for rows in (1024, 4096):
            for l0 in L0S:
                shape = {"N": rows, "T": POSITIONS, "d": WIDTH, "F": features, "H": 1, "L0": l0}
                for form, implementations in PEER_STEPS.items():
                    # Dense steps cost the same at every L0: once is enough.
                    kept = tuple(i for i in implementations if l0 == 64 or not DENSE.search(i.split(":")[1]))
                    yield Work(f"sae step, {form}", kept, "attn_out_sae", shape)
                naive = ("ours:batch_topk/feature-side", "ours:batch_topk/decoder-side")
                ours = ("ours:batch_topk", "ours:l1-pre")
                kept = ours + (naive if l0 == 64 and rows == 1024 else ())
                yield Work("mtc step", kept, "mtc", shape | {"H": MOVERS})
        shape = {"N": 1024, "T": POSITIONS, "d": WIDTH, "F": features, "H": 1, "L0": 64}
        pair = ("ours:l1-pre", "peers:saelens/standard")
        yield Work("sae step with Adam, l1", pair, "attn_out_sae", shape, optimiser=True)
        mtc = ("ours:batch_topk", "ours:batch_topk/feature-side")
        yield Work("mtc step with Adam", mtc, "mtc", shape | {"H": MOVERS}, optimiser=True)


def measure(work: Work, inputs: Path, sides: dict[str, Side], pairs: int) -> list[dict[str, Any]]:
    """Rows of one work."""
    turns: dict[str, list[dict[str, float]]] = {}
    failures: dict[str, str] = {}
    for name in work.implementations:
        side, implementation = name.split(":")
        options = {"l0": work.shape["L0"], "rows": work.shape["N"], "optimiser": work.optimiser}
        answer = sides[side].ask(do="build", key=name, implementation=implementation, inputs=str(inputs),
                                 options=options, shape=work.shape, warm=2)  # fmt: skip
        if "error" in answer:
            failures[name] = answer["error"]
    alive = [name for name in work.implementations if name not in failures]
    for _ in range(pairs):
        for name in alive:
            answer = sides[name.split(":")[0]].ask(do="run", key=name)
            turns.setdefault(name, []).append(answer)
    rows = []
    for name in work.implementations:
        row: dict[str, Any] = {"work": work.name, "implementation": name.replace(":", "/"), "shape": work.shape}
        if name in failures:
            rows.append(row | {"error": failures[name]})
            continue
        own, first = turns[name], turns[alive[0]]
        row |= {
            "seconds_median": statistics.median(t["seconds"] for t in own),
            "peak_bytes": sides[name.split(":")[0]].ask(do="peak", key=name)["peak_bytes"],
            "ratio_to_encoder_product": statistics.median(t["seconds"] / t["product"] for t in own),
            "ratio_to_ours": statistics.median(t["seconds"] / o["seconds"] for t, o in zip(own, first, strict=True)),
            "product_gflops": statistics.median(_gflop(work.shape) / t["product"] for t in own),
            "pairs": pairs,
        }
        rows.append(row)
    for side in sides.values():
        side.ask(do="forget")
    return rows


def _gflop(shape: dict[str, int]) -> float:
    return 2 * shape["N"] * shape["d"] * shape["F"] / 1e9


def peers_python() -> Path:
    """The peers' environment, made if it is missing."""
    home = HOME / ".venv-peers"
    python = home / "bin" / "python"
    if not (home / ".installed").exists():
        print("installing the peers into benchmarks/.venv-peers")
        venv.create(home, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", str(HOME / "requirements-peers.txt")], check=True)
        # Its requirements pin an nnsight that fits no current transformers; its trainers need none of them.
        subprocess.run([*install, "--no-deps", "dictionary-learning==0.1.0"], check=True)
        (home / ".installed").touch()
    return python


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {"cpu": model, "avx512": "avx512f" in flags, "cores": os.cpu_count(), "threads": 2,
            "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip


def _lines(path: str) -> Iterable[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else ()


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "laptop")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", default="", help="a pattern that work, implementation and shape must match")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    sides = {"ours": Side("ours", Path(sys.executable)), "peers": Side("peers", peers_python())}
    rows: list[dict[str, Any]] = []
    for work in works():
        if not re.search(arguments.only, f"{work.name} {work.shape}"):
            continue
        inputs = prepare(arguments.data, HOME / ".inputs", work.kind, work.shape["F"])
        large = work.shape["N"] * work.shape["F"] > 2**26
        rows += measure(work, inputs, sides, max(3, arguments.pairs // 2) if large else arguments.pairs)
        for row in rows[-len(work.implementations) :]:
            print(_line(row), flush=True)
    for row in whole_rows(ROOT, arguments.data, arguments.pairs) if not arguments.only else ():
        rows.append(row)
        print(row, flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "rows": rows}
    write_tables(HOME, result)


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    if "error" in row:
        return f"{row['work']:24} {row['implementation']:34} {shape}: {row['error']}"
    return (f"{row['work']:24} {row['implementation']:34} {shape}: {row['seconds_median'] * 1e3:.0f} ms, "
            f"{row['ratio_to_encoder_product']:.2f} products, {row['ratio_to_ours']:.2f} of ours, "
            f"{row['peak_bytes'] / 2**20:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
