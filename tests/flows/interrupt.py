"""Kill `make findings` at random, seeded moments, let it finish, and compare with a run that was left alone.

    python -m tests.flows.interrupt [--profile smoke] [--seed 0] [--directory DIR] [--undisturbed REPOSITORY]

Two copies of the work tree run the same profile. One of them is killed three times with SIGKILL, the whole process
group at once: while a random shard of the harvest is made, after a random checkpoint of a random training, and at a
random moment of a random other stage. The sha256 of both metrics.json must be equal. Exit code 0 when it is. A clone of
the same commit that has finished the profile without disturbance can stand for the undisturbed copy.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
STAGE_SECONDS = 8.0
"""How long a stage is taken to last when nobody timed it."""
_STAGE = re.compile(r"^Running stage '(?:.*:)?([^':]+)':")


@dataclass
class Findings:
    """A running `make findings` and what it has said."""

    directory: Path
    profile: str
    stage: str = "start"
    spans: dict[str, list[float]] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            # -o: the copy's environment is this one, and stays as it is installed.
            ["make", "-o", ".venv/.installed", "findings", f"PROFILE={self.profile}"], cwd=self.directory,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if found := _STAGE.match(line):
                self._enter(found[1])

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if self.stage in self.spans:
            self.spans[self.stage][1] = now
        self.stage = stage
        self.spans[stage] = [now, now]

    def wait(self) -> int:
        """Exit code, once everything is said."""
        code = self.process.wait()
        self._reader.join()
        self._enter("end")
        return code

    def kill(self) -> None:
        """SIGKILL to make, DVC and the stage at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def copy_of_work_tree(target: Path) -> Path:
    """Tracked and new files, this environment, and a git history of one commit."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    (target / ".venv").symlink_to(Path(sys.prefix))
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        subprocess.run(["git", *identity, *command], cwd=target, check=True)
    return target


def shards_made(directory: Path) -> int:
    """Whole shards of an unfinished harvest."""
    return len(list(directory.glob("work/*/cache/*.arrow")))


def last_checkpoint(directory: Path) -> int:
    """Step of an unfinished training's last checkpoint; 0 before the first."""
    steps = [json.loads(path.read_text()).get("step", 0) for path in directory.glob("work/*/checkpoint/*.json")]
    return max(steps, default=0)


def kill_when(findings: Findings, ready: Callable[[], bool]) -> bool:
    """Kill as soon as ``ready``; False when the run ended before that."""
    while findings.process.poll() is None:
        if ready():
            findings.kill()
            return True
        time.sleep(0.02)
    return False


def three_kills(
    directory: Path, profile: str, chance: random.Random, undisturbed: dict[str, tuple[float, float]]
) -> None:
    """Kill and start again three times, and say where; ``undisturbed`` has each stage's begin and end in seconds."""
    home = ROOT if profile == "laptop" else ROOT / "flows" / "profiles" / profile
    parameters = yaml.safe_load((home / "params.yaml").read_text())
    corpus, size = parameters["corpus"], parameters["harvest"]["shard_contexts"]
    n_shards = -(-corpus["train_contexts"] // size) + -(-corpus["heldout_contexts"] // size)

    shard = chance.randrange(1, n_shards)
    findings = Findings(directory, profile)
    killed = kill_when(findings, lambda: findings.stage == "harvest" and shards_made(directory) >= shard)
    assert killed, "\n".join(findings.lines[-20:])
    print(f"kill 1: stage {findings.stage}, {shards_made(directory)} of {n_shards} shards made", flush=True)

    entered = set(findings.spans)
    run = chance.choice(sorted(parameters["runs"]))
    every, steps = parameters["training"]["checkpoint_every"], parameters["training"]["steps"]
    step, delay = chance.randrange(every, steps, every), chance.random() * 0.5
    findings = Findings(directory, profile)

    def in_training() -> bool:
        if findings.stage != f"train@{run}" or last_checkpoint(directory) < step:
            return False
        time.sleep(delay)
        return True

    killed = kill_when(findings, in_training)
    assert killed, f"{run} ended before step {step}\n" + "\n".join(findings.lines[-20:])
    print(
        f"kill 2: stage {findings.stage}, last checkpoint at step {last_checkpoint(directory)} of {steps}", flush=True
    )

    entered |= set(findings.spans)
    left = [name for name in undisturbed if name not in ("end", "start") and name not in entered]
    stage = chance.choice(left)
    begin, end = undisturbed[stage]
    moment = chance.random() * (end - begin)
    findings = Findings(directory, profile)

    def in_stage() -> bool:
        return findings.stage == stage and time.monotonic() - findings.spans[stage][0] >= moment

    if kill_when(findings, in_stage):
        print(f"kill 3: stage {findings.stage}, {moment:.1f} s after its start", flush=True)
    else:
        print(f"kill 3 came too late: {stage} ended before {moment:.1f} s; not counted", flush=True)


def sha256_of_metrics(directory: Path, profile: str) -> str:
    """Hash of the finished metrics.json."""
    reports = directory / "reports" if profile == "laptop" else directory / "reports" / profile
    return hashlib.sha256((reports / "metrics.json").read_bytes()).hexdigest()


def finished(findings: Findings, name: str) -> str:
    """Wait for the end, and the hash of the metrics; exit when the run failed."""
    if findings.wait():
        raise SystemExit("\n".join([f"{name}: make findings failed", *findings.lines[-20:]]))
    return sha256_of_metrics(findings.directory, findings.profile)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.flows.interrupt", description=__doc__)
    parser.add_argument("--profile", default="smoke")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where the copies go; a temporary directory by default")
    parser.add_argument("--undisturbed", type=Path, help="a finished clone to compare with, instead of a copy run here")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp(prefix="crosshead-interrupt-"))
    if options.undisturbed:
        home = ROOT if options.profile == "laptop" else ROOT / "flows" / "profiles" / options.profile
        lock = yaml.safe_load((options.undisturbed / home.relative_to(ROOT) / "dvc.lock").read_text())
        spans = dict.fromkeys(lock["stages"], (0.0, STAGE_SECONDS))
        hashes = [sha256_of_metrics(options.undisturbed, options.profile)]
    else:
        alone = Findings(copy_of_work_tree(directory / "undisturbed"), options.profile)
        hashes = [finished(alone, "undisturbed")]
        spans = {stage: (times[0], times[1]) for stage, times in alone.spans.items()}
    print(f"undisturbed: sha256 of metrics.json is {hashes[0]}", flush=True)
    three_kills(copy_of_work_tree(directory / "killed"), options.profile, random.Random(options.seed), spans)
    hashes.append(finished(Findings(directory / "killed", options.profile), "killed"))
    print(f"killed: sha256 of metrics.json is {hashes[1]}", flush=True)
    print("equal" if hashes[0] == hashes[1] else "DIFFERENT", f"(seed {options.seed}, copies in {directory})")
    return 0 if hashes[0] == hashes[1] else 1


if __name__ == "__main__":
    raise SystemExit(_main())
