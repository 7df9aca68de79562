"""Kill `make findings` at random, seeded moments, let it finish, and compare with a run that was left alone.

    python -m tests.flows.interrupt [--profile smoke] [--seed 0] [--directory DIR] [--undisturbed REPOSITORY]

Two copies of the work tree run the same profile. One of them is killed three times with SIGKILL, the whole process
group at once: while a random shard of the harvest is made, after a random checkpoint of a random training, and at a
random moment of a random stage that had not begun before. Stages run in the order of DVC's graph, which is not the
order of the file: a stage that was too quick is replaced by another one that has not begun. Exit code 0 means three
kills and the same sha256 of both metrics.json. A clone of the same commit that has finished the profile without
disturbance can stand for the undisturbed copy.
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
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from crosshead.params import Params, load_params

ROOT = Path(__file__).resolve().parents[2]
TRAINING_SECONDS = 8.0
"""How long a training is taken to last when nobody timed it; its start alone takes most of that."""
PUNCTUAL = 0.8
"""The third kill comes in this first part of its stage: not every stage takes as long again as it did undisturbed."""
_STAGE = re.compile(r"^Running stage '(?:.*:)?([^':]+)':")


@dataclass
class Findings:
    """A running `make findings` and what it has said."""

    directory: Path
    profile: str
    stage: str = "start"
    begun: float = 0.0
    """When the stage began, as files' times have it."""
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
        self.spans[stage], self.begun = [now, now], time.time()
        self.stage = stage

    def wait(self) -> int:
        """Exit code, once everything is said."""
        code = self.process.wait()
        self._reader.join()
        self._enter("end")
        return code

    def kill(self) -> bool:
        """SIGKILL to make, DVC and the stage at once; False when make had ended by itself."""
        os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait() == -signal.SIGKILL


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


def last_checkpoint(directory: Path, since: float) -> int:
    """Step of the last checkpoint written after ``since``, 0 before the first; killed trainings leave older ones."""
    steps = [0]
    for path in directory.glob("work/*/checkpoint/state.json"):
        try:
            if path.stat().st_mtime >= since:
                steps.append(json.loads(path.read_text())["step"])
        except (FileNotFoundError, json.JSONDecodeError):
            continue  # it is being replaced by the next one
    return max(steps)


def kill_in(findings: Findings, stage: str, ready: Callable[[], bool]) -> bool:
    """Kill as soon as ``stage`` runs and is ``ready``; False when the stage, or everything, ended before that."""
    while findings.process.poll() is None:
        if findings.stage == stage:
            if ready() and findings.stage == stage:
                return findings.kill()
        elif stage in findings.spans and findings.spans[stage][1] > findings.spans[stage][0]:
            return False
        time.sleep(0.02)
    return False


def kill_in_one_of(
    findings: Findings, stages: Collection[str], chance: random.Random, moment: Callable[[str], Callable[[], bool]]
) -> None:
    """Kill in a random stage among these that has not begun, at ``moment(stage)``; if it was too quick, in another.

    Exits when no stage is left.
    """
    while findings.process.poll() is None and (left := sorted(set(stages) - findings.spans.keys())):
        stage = chance.choice(left)
        if kill_in(findings, stage, moment(stage)):
            return
        print(f"{stage} ended before its moment came; another stage is taken", flush=True)
    if findings.process.poll() is None:
        findings.kill()
    raise SystemExit("\n".join(["too few kills: no stage is left to be killed in", *findings.lines[-20:]]))


def three_kills(directory: Path, profile: str, chance: random.Random, durations: dict[str, float]) -> None:
    """Kill and start again three times, and say where; ``durations`` has stages' seconds. Exits if it cannot."""
    params = load_params(home(directory, profile) / "params.yaml")
    begun = kill_in_harvest(Findings(directory, profile), params, chance)
    begun |= kill_in_training(Findings(directory, profile), params, chance)
    kill_in_new_stage(Findings(directory, profile), params, chance, {
        stage: seconds for stage, seconds in durations.items() if stage not in begun
    })  # fmt: skip


def kill_in_harvest(findings: Findings, params: Params, chance: random.Random) -> set[str]:
    """Kill while a random shard is made. Returns the stages that have begun."""
    size = params.harvest.shard_contexts
    n_shards = -(-params.corpus.train_contexts // size) + -(-params.corpus.heldout_contexts // size)
    shard = chance.randrange(1, n_shards)
    kill_in_one_of(findings, ["harvest"], chance, lambda stage: lambda: shards_made(findings.directory) >= shard)
    print(f"kill 1: stage {findings.stage}, {shards_made(findings.directory)} of {n_shards} shards made", flush=True)
    return set(findings.spans)


def kill_in_training(findings: Findings, params: Params, chance: random.Random) -> set[str]:
    """Kill within half a second after a random checkpoint of a random training. Returns the stages that have begun."""

    def moment(stage: str) -> Callable[[], bool]:
        schedule = params.runs[stage.removeprefix("train@")].schedule
        every = schedule.checkpoint_every
        step, delay = chance.randrange(every, max(schedule.steps, every + 1), every), chance.random() * 0.5

        def ready() -> bool:
            if last_checkpoint(findings.directory, findings.begun) < step:
                return False
            time.sleep(delay)
            return True

        return ready

    kill_in_one_of(findings, [f"train@{run}" for run in params.runs], chance, moment)
    print(f"kill 2: stage {findings.stage}, {steps_done(findings, params)}", flush=True)
    return set(findings.spans)


def kill_in_new_stage(findings: Findings, params: Params, chance: random.Random, durations: dict[str, float]) -> None:
    """Kill at a random moment of a random stage among these, which have never begun."""
    planned = 0.0

    def moment(stage: str) -> Callable[[], bool]:
        nonlocal planned
        planned = seconds = PUNCTUAL * chance.random() * durations[stage]
        return lambda: time.monotonic() - findings.spans[stage][0] >= seconds

    kill_in_one_of(findings, durations, chance, moment)
    print(
        f"kill 3: stage {findings.stage}, {planned:.1f} s after its start, {steps_done(findings, params)}", flush=True
    )


def steps_done(findings: Findings, params: Params) -> str:
    """How far the stage had come, in steps, if it is a training."""
    kind, _, run = findings.stage.partition("@")
    if kind not in ("train", "nulls"):
        return "which has no steps that are known here"
    total = params.runs[run].schedule.steps
    return f"last checkpoint at step {last_checkpoint(findings.directory, findings.begun)} of {total}"


def home(directory: Path, profile: str) -> Path:
    """Where a profile's dvc.yaml, params.yaml and dvc.lock lie."""
    return directory if profile == "laptop" else directory / "flows" / "profiles" / profile


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
        lock = yaml.safe_load((home(options.undisturbed, options.profile) / "dvc.lock").read_text())
        durations = {stage: TRAINING_SECONDS for stage in lock["stages"] if stage.startswith("train@")}
        undisturbed: Path = options.undisturbed
    else:
        undisturbed = copy_of_work_tree(directory / "undisturbed")
        alone = Findings(undisturbed, options.profile)
        finished(alone, "undisturbed")
        durations = {stage: end - begin for stage, (begin, end) in alone.spans.items() if stage != "end"}
    three_kills(copy_of_work_tree(directory / "killed"), options.profile, random.Random(options.seed), durations)
    killed = finished(Findings(directory / "killed", options.profile), "killed")
    hashes = sha256_of_metrics(undisturbed, options.profile), killed
    print("sha256 of metrics.json, undisturbed and killed: {}, {}".format(*hashes), flush=True)
    print("equal" if hashes[0] == hashes[1] else "DIFFERENT", f"(seed {options.seed}, copies in {directory})")
    return 0 if hashes[0] == hashes[1] else 1


if __name__ == "__main__":
    raise SystemExit(_main())
