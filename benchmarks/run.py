"""Time our steps beside the peers' on this machine: ``make bench``.

    python -m benchmarks.run [--data data/laptop] [--pairs 7] [--only PATTERN [--add]]

Implementations of one work take turns, one step each, in an order that moves on every round, and a turn begins with a
preallocated product of the encoder's shape in the same process: a machine that slows down slows all of them. Ratios are
medians over the rounds. Writes latest.json, a dated table and plots beside this file; with --only it prints and writes
nothing, with --add as well what was measured takes the place of such rows in latest.json, unless more of it failed.
Memory of a step is measured in a process of its own for every row, with the allocator's default settings: a second
worker of each environment forks them. What is measured as a whole runs in this process.
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

from benchmarks.parts import PARTS, step_parts
from benchmarks.prepare import L0S, prepare
from benchmarks.table import write_tables
from benchmarks.whole import whole_rows
from crosshead.io.files import write_json

HOME = Path(__file__).resolve().parent
ROOT = HOME.parent
POSITIONS, WIDTH, MOVERS = 256, 576, 10
FEATURES = (2048, 8192, 32768)
PEER_STEPS = {
    "l1": ("ours:l1", "ours:l1-pre", "peers:saelens/standard", "peers:dictionary_learning/standard"),
    "topk": ("ours:topk", "peers:sparsify/topk", "peers:saelens/topk", "peers:dictionary_learning/topk"),
    "jumprelu": ("ours:jumprelu", "peers:saelens/jumprelu"),
}
DICTIONARY_LEARNING = "dictionary-learning==0.1.0"
_LARGE = 4096 * 8192
DENSE = re.compile("peers:.*(standard|jumprelu)|-side")


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
    """A worker process of one environment. CROSSHEAD_BENCH_THREADS (2) is the number of its threads."""

    name: str
    python: Path
    process: Any = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin the process, or another in its place."""
        settings = {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]),
            "OMP_WAIT_POLICY": "passive",
            "WANDB_MODE": "disabled",
            "SPARSIFY_DISABLE_TRITON": "1",
        }
        self.process = subprocess.Popen(
            [str(self.python), "-m", "benchmarks.worker", self.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=(HOME / f"{self.name}.log").open("a"), text=True, cwd=ROOT, env=os.environ | settings,
        )  # fmt: skip

    def ask(self, **message: Any) -> dict[str, Any]:
        """Send a request, wait for the answer."""
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        self.start()  # for the works that come after
        return {"error": f"the worker ended; see benchmarks/{self.name}.log"}


def works() -> Iterator[Work]:
    """Everything that is timed by turns."""
    for features in FEATURES:
        for rows in (1024, 4096):
            for l0 in L0S:
                shape = {"N": rows, "T": POSITIONS, "d": WIDTH, "F": features, "H": 1, "L0": l0}
                for form, implementations in PEER_STEPS.items():
                    # Dense steps cost the same at every L0: once is enough.
                    kept = tuple(i for i in implementations if l0 == 64 or not DENSE.search(i))
                    yield Work(f"sae step, {form}", kept, "attn_out_sae", shape)
                mtc = ("ours:batch_topk", "ours:l1-pre")
                yield Work("mtc step", mtc, "mtc", shape | {"H": MOVERS})
        shape = {"N": 1024, "T": POSITIONS, "d": WIDTH, "F": features, "H": 1, "L0": 64}
        for form, pair in (("l1", ("ours:l1-pre", "peers:saelens/standard")),
                           ("topk", ("ours:topk", "peers:sparsify/topk"))):  # fmt: skip
            yield Work(f"sae step with Adam, {form}", pair, "attn_out_sae", shape, optimiser=True)
        naive = ("ours:l1", "ours:l1/feature-side", "ours:l1/decoder-side")
        # At the largest size four times the rows would take their dense steps half an hour and 10 GB.
        for rows in (1024,) if features == max(FEATURES) else (1024, 4096):
            yield Work("mtc step, naive", naive, "mtc", shape | {"N": rows, "H": MOVERS})
        yield Work("mtc step with Adam", naive[:2], "mtc", shape | {"H": MOVERS}, optimiser=True)
        for rows in (1024, 4096):
            lorsa = ("ours:topk", "peers:llamascopium/lorsa")
            yield Work("mtc step, lorsa", lorsa, "mtc", shape | {"N": rows, "H": MOVERS})
    shape = {"N": 1024, "T": POSITIONS, "d": WIDTH, "F": 8192, "H": MOVERS, "L0": 64}
    for change in ({"T": 64}, {"T": 128}, {"H": 2}, {"H": 5}):
        yield Work("mtc step", ("ours:batch_topk",), "mtc", shape | change)


def rounds(work: Work, pairs: int) -> int:
    """Three where a round of dense steps takes a minute."""
    return min(pairs, 3) if work.shape["N"] * work.shape["F"] >= _LARGE else pairs


def measure(
    work: Work, inputs: Path, sides: dict[str, Side], fresh: dict[str, Side], pairs: int
) -> list[dict[str, Any]]:
    """Rows of one work. A row that failed holds an error instead of figures."""
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in work.implementations}
    failures: dict[str, str] = {}
    requests = {name: _request(work, name, inputs) for name in work.implementations}
    for name, request in requests.items():
        answer = sides[name.split(":")[0]].ask(do="build", key=name, shape=work.shape, **request)
        if "error" in answer:
            failures[name] = answer["error"]
    for i in range(pairs):
        first = i % len(work.implementations)
        for name in (*work.implementations[first:], *work.implementations[:first]):
            if name not in failures:
                answer = sides[name.split(":")[0]].ask(do="run", key=name)
                if "error" in answer:
                    failures[name] = answer["error"]
                else:
                    turns[name].append(answer)
    for side in sides.values():
        side.ask(do="forget")
    ours = work.implementations[0]
    rows = []
    for name, request in requests.items():
        row: dict[str, Any] = {"work": work.name, "implementation": name.replace(":", "/"), "shape": work.shape}
        if name in failures:
            rows.append(row | {"error": failures[name]})
            continue
        own = turns[name]
        ratios = [t["seconds"] / o["seconds"] for t, o in zip(own, turns[ours], strict=False)]
        products = [t["seconds"] / t["product"] for t in own]
        memory = fresh[name.split(":")[0]].ask(do="peak", **request)
        if "error" in memory:
            row["memory_error"] = memory["error"]
        rows.append(row | {
            "seconds_median": statistics.median(t["seconds"] for t in own),
            "peak_bytes": memory.get("peak_bytes"),
            "ratio_to_encoder_product": statistics.median(products),
            "ratio_to_encoder_product_quartiles": statistics.quantiles(products, n=4)[::2],
            "ratio_to_ours": statistics.median(ratios) if ratios else None,
            "product_gflops": statistics.median(_gflop(work.shape) / t["product"] for t in own),
            "pairs": pairs,
        })  # fmt: skip
    return rows


def _request(work: Work, name: str, inputs: Path) -> dict[str, Any]:
    side, implementation = name.split(":")
    options: dict[str, Any] = {"l0": work.shape["L0"], "rows": work.shape["N"], "optimiser": work.optimiser}
    if side == "ours":
        options["positions"] = work.shape["T"]
        if 1 < work.shape["H"] < MOVERS:
            options["heads"] = work.shape["H"] - 1
    return {"implementation": implementation, "inputs": str(inputs), "options": options}


def _gflop(shape: dict[str, int]) -> float:
    return 2 * shape["N"] * shape["d"] * shape["F"] / 1e9


def peers_python() -> Path:
    """The peers' environment, made if it is missing or was made of other requirements."""
    home = HOME / ".venv-peers"
    python, marker = home / "bin" / "python", home / ".installed"
    requirements = (HOME / "requirements-peers.txt").read_text() + DICTIONARY_LEARNING
    if not marker.exists() or marker.read_text() != requirements:
        print("installing the peers into benchmarks/.venv-peers")
        venv.create(home, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, "-r", str(HOME / "requirements-peers.txt")], check=True)
        # Its requirements pin an nnsight that fits no current transformers; its trainers need none of them.
        subprocess.run([*install, "--no-deps", DICTIONARY_LEARNING], check=True)
        marker.write_text(requirements)
    return python


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    model = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    threads = int(os.environ.get("CROSSHEAD_BENCH_THREADS", "2"))
    return {"cpu": model, "avx512": "avx512f" in flags, "cores": os.cpu_count(), "threads": threads,
            "python": platform.python_version(), "torch": torch.__version__}  # fmt: skip


def _lines(path: str) -> Iterable[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else ()


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "laptop")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", default="", help="a pattern to be found in work or shape")
    parser.add_argument("--add", action="store_true", help="with --only: put what was measured into latest.json")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    pythons = {"ours": Path(sys.executable), "peers": peers_python()}
    sides, fresh = ({name: Side(name, python) for name, python in pythons.items()} for _ in range(2))
    rows: list[dict[str, Any]] = []
    latest, kept = HOME / "latest.json", arguments.add or not arguments.only
    earlier = json.loads(latest.read_text()) if latest.exists() else []
    date, here = time.strftime("%Y-%m-%d"), machine()

    def keep(new: list[dict[str, Any]]) -> None:
        """Written at once: a run that is killed has put what it measured into the place of earlier rows."""
        rows.extend(row | {"date": date, "machine": here} for row in new)
        if kept:
            write_json(latest, merged(earlier, rows))

    for work in works():
        if not re.search(arguments.only, f"{work.name} {work.shape}"):
            continue
        inputs = prepare(arguments.data, HOME / ".inputs", work.kind, work.shape["F"])
        new = measure(work, inputs, sides, fresh, rounds(work, arguments.pairs))
        print(*map(_line, new), sep="\n", flush=True)
        keep(new)
    if re.search(arguments.only, PARTS):
        mtc = {features: prepare(arguments.data, HOME / ".inputs", "mtc", features) for features in FEATURES}
        keep(list(step_parts(mtc, arguments.pairs)))
    for row in whole_rows(ROOT, arguments.data, arguments.pairs, arguments.only):
        print(row, flush=True)
        keep([row])
    if not rows:
        parser.error(f"--only {arguments.only!r} is found in no work; works are called 'mtc step', 'sae step, l1', ...")
    if kept:
        write_tables(HOME, merged(earlier, rows) if arguments.add else rows, date)


def merged(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows; new ones of a work and shape take the place of the old ones, other new ones come last.

    Where more of the new rows failed than of the old ones, the old ones stay.
    """
    groups, others = _by_work(rows), _by_work(new)
    groups |= {key: group for key, group in others.items() if _failures(group) <= _failures(groups.get(key, group))}
    return [row for group in groups.values() for row in group]


def _by_work(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["work"], json.dumps(row["shape"], sort_keys=True)), []).append(row)
    return groups


def _failures(rows: Iterable[dict[str, Any]]) -> int:
    return sum("error" in row for row in rows)


def _line(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    if "error" in row:
        return f"{row['work']:24} {row['implementation']:34} {shape}: {row['error']}"
    return (f"{row['work']:24} {row['implementation']:34} {shape}: {row['seconds_median'] * 1e3:.0f} ms, "
            f"{row['ratio_to_encoder_product']:.2f} products, {row['ratio_to_ours'] or 0:.2f} of ours, "
            f"{(row['peak_bytes'] or 0) / 2**20:.0f} MiB")  # fmt: skip


if __name__ == "__main__":
    main()
