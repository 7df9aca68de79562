"""A process that builds steps and times them when it is told to. Runs in either environment.

    python -m benchmarks.worker ours|peers

Reads one JSON object per line, answers with one. ``build`` makes a step of an implementation and warms it up;
``run`` times it once, right after a preallocated product of the encoder's shape; ``peak`` says by how much resident
memory grows during a step, in a process forked for it: ask it of a worker that builds nothing itself. Nothing is timed
before it was asked for, so the driver decides who runs when.
"""

import ctypes
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], Any]
_PEAKS = 3


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(int(os.environ.get("CROSSHEAD_BENCH_THREADS", "2")))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    build = importlib.import_module(f"benchmarks.{sys.argv[1]}").build
    steps: dict[str, tuple[Step, Step]] = {}
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = _answer(message, steps, build)
        except Exception as error:  # the driver notes it beside the row
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(message: dict[str, Any], steps: dict[str, tuple[Step, Step]], build: Callable[..., Step]) -> dict[str, Any]:
    match message["do"]:
        case "build":
            step = build(message["implementation"], Path(message["inputs"]), **message["options"])
            product = _encoder_product(message["shape"])
            for _ in range(2):
                step()
                product()
            steps[message["key"]] = step, product
            return {}
        case "run":
            step, product = steps[message["key"]]
            return {"product": _seconds(product), "seconds": _seconds(step)}
        case "peak":
            return _forked(lambda: _peak(build, message))
        case "forget":
            steps.clear()
            return {}
        case other:
            raise ValueError(f"unknown request {other!r}")


def _encoder_product(shape: dict[str, int]) -> Step:
    x, weight = torch.randn(shape["N"], shape["d"]), torch.randn(shape["F"], shape["d"])
    out = torch.empty(shape["N"], shape["F"])
    return lambda: torch.mm(x, weight.T, out=out)


def _seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _forked(ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Answer in a child process, which has this one's imports and nothing else of its past."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = ask()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer or b'{"error": "the process that was to measure memory ended"}')


def _peak(build: Callable[..., Step], message: dict[str, Any]) -> dict[str, Any]:
    """Growth of resident memory during a step over inputs and weights, gradients included (Linux with glibc).

    The median of some steps: memory that was freed may or may not have gone back.
    """
    step = build(message["implementation"], Path(message["inputs"]), **message["options"], keep_memory=False)
    found = []
    for _ in range(_PEAKS + 1):
        step().zero_grad(set_to_none=True)
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status("VmRSS")
        step()
        found.append(max(0, status("VmHWM") - before))
    return {"peak_bytes": statistics.median(found[1:])}


def status(name: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    main()
