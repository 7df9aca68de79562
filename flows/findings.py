"""A whole profile as one Prefect flow, for long runs: several trainings at once, retries, progress in the Prefect UI.

DVC stays the only record of outputs. Every task runs its stage through ``dvc repro --single-item``, so ``dvc status``
is clean afterwards; DVC lets go of its lock while a stage's command runs, which is what lets two run at once.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from prefect import flow, get_run_logger, tags, task
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ThreadPoolTaskRunner

from crosshead.io.files import read_json
from flows._prefect import process_tags, reap_killed_runs
from flows._runtime import repository_root
from flows._tracking import experiment_name, open_client
from flows._views import add_views
from flows.servers import NoServerError, interrupt_on_termination, prefect_server, viewer_address

__all__ = ["findings", "stage_graph"]

_WRONG_PARAMETERS, _INTERRUPTED, _DVC_INTERRUPTED = 2, 130, 252
_EXIT_CODE = re.compile(r"^ERROR: failed to reproduce .*, exited with (-?\d+)$", re.MULTILINE)
_RETRIES = 2
_GOOD = ("done", "unchanged")
_TRAININGS = {"train": "runs", "attention": "attention_runs"}
"""The stages that train, and the section that holds each one's runs. Names are unique over both."""


class StageFailedError(RuntimeError):
    """A stage ended with an error; the message ends with its last lines."""

    def __init__(self, message: str, exit_code: int | None = None):
        super().__init__(message)
        self.exit_code = exit_code
        """What the stage's own process ended with; None when it did not come to that."""


def stage_graph(pipeline: Path) -> dict[str, set[str]]:
    """Every stage of one dvc.yaml by its DVC address, in the order DVC would run them, with the stages it waits for."""
    from dvc.repo import Repo
    from networkx import topological_sort

    with Repo() as repo:
        graph = repo.index.graph.reverse()
        own = [stage for stage in topological_sort(graph) if Path(stage.path).resolve() == pipeline.resolve()]
        return {stage.addressing: {needed.addressing for needed in graph.predecessors(stage)} for stage in own}


def _worth_another_try(task: Any, task_run: Any, state: Any) -> bool:
    """Wrong parameters and files stay wrong, who interrupts means it; everything else may have been the machine."""
    return getattr(state.data, "exit_code", None) not in (_WRONG_PARAMETERS, _INTERRUPTED)


def _exit_code(output: str) -> int | None:
    """The exit code of the stage that ``dvc repro`` ran: DVC's own is 255 whatever happened, but it prints this one."""
    printed = _EXIT_CODE.findall(output)
    return int(printed[-1]) if printed else None


@task(retries=_RETRIES, retry_delay_seconds=5, retry_condition_fn=_worth_another_try, cache_policy=NO_CACHE,
      persist_result=False, task_run_name="{stage}")  # fmt: skip
def reproduce(stage: str) -> str:
    """Run one stage through DVC, if DVC finds it changed."""
    log = repository_root() / "work" / "logs" / f"{stage.replace('/', '-').replace(':', '-')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # The stage runs as a plain function: a flow in a subprocess would not be linked to this one.
    environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    with log.open("w", encoding="utf-8") as output:
        result = subprocess.run(
            [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", stage],
            stdout=output, stderr=subprocess.STDOUT, env=environment, check=False,
        )  # fmt: skip
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    if result.returncode:
        code = _INTERRUPTED if result.returncode == _DVC_INTERRUPTED else _exit_code(text)
        raise StageFailedError(f"{stage}: " + "\n".join(lines[-20:]), code)
    skipped = any("didn't change, skipping" in line for line in lines)
    get_run_logger().info("%s: %s", stage, "nothing to do" if skipped else f"done, log in {log}")
    return "unchanged" if skipped else "done"


@flow(name="findings", flow_run_name="findings {pipeline}", persist_result=False)
def findings(pipeline: str, workers: int) -> dict[str, str]:
    """Run every stage of a pipeline as soon as the stages it needs are done, ``workers`` at a time."""
    logger = get_run_logger()
    needs, sections = stage_graph(Path(pipeline)), _sections(Path(pipeline))
    progress: Any = create_progress_artifact(progress=0.0, key="stages", description=f"stages of {pipeline}")
    outcome: dict[str, str] = {}
    running: dict[PrefectFuture[str], str] = {}
    waiting = list(needs)
    while waiting or running:
        ready = [stage for stage in waiting if all(outcome.get(needed) in _GOOD for needed in needs[stage])]
        for stage in ready[: workers - len(running)]:
            waiting.remove(stage)
            running[reproduce.submit(stage)] = stage
        if not running:
            break
        future = next(iter(as_completed(list(running))))
        stage = running.pop(future)
        result = future.result(raise_on_failure=False)
        outcome[stage] = result if isinstance(result, str) else "failed"
        logger.info("%d of %d stages, %s: %s", len(outcome), len(needs), stage, outcome[stage])
        update_progress_artifact(progress, progress=100.0 * len(outcome) / len(needs))
        if _training(stage):
            _show_runs(sections, outcome)
    _show_runs(sections, outcome)
    _show_findings(sections)
    failed = [stage for stage, result in outcome.items() if result == "failed"]
    if failed:
        raise StageFailedError(
            f"{', '.join(failed)} failed; {len(waiting)} stages that need them were not run. Logs: work/logs"
        )
    return outcome


def _sections(pipeline: Path) -> Mapping[str, Any]:
    """The parameters beside a pipeline."""
    parameters = pipeline.with_name("params.yaml")
    return yaml.safe_load(parameters.read_text(encoding="utf-8")) if parameters.exists() else {}


def _training(stage: str) -> str | None:
    """Name of the run that a stage trains."""
    kind, _, run = stage.rpartition(":")[2].partition("@")
    return run if run and kind in _TRAININGS else None


def _runs(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {name: run for key in _TRAININGS.values() for name, run in (sections.get(key) or {}).items()}


def _show_runs(sections: Mapping[str, Any], outcome: Mapping[str, str]) -> None:
    """The trainings and what came out so far as an artifact; the same key again is its next version."""
    ended = {_training(stage): result for stage, result in outcome.items()}
    rows = [
        {"run": run, "state": ended.get(run, "not yet"), **(_summary(sections, run) if ended.get(run) in _GOOD else {})}
        for run in _runs(sections)
    ]
    if rows:
        create_table_artifact(table=rows, key="runs", description=f"trainings of the {sections.get('profile')} profile")


def _summary(sections: Mapping[str, Any], run: str) -> Mapping[str, Any]:
    path = Path(sections["paths"]["reports"], "summaries", f"{run}.json")
    return read_json(path) if path.exists() else {}


def _show_findings(sections: Mapping[str, Any]) -> None:
    """The findings and the addresses of the frontiers in MLflow as artifacts, as far as they exist.

    The findings page itself is named, not linked: browsers follow no link from a server's page to a file.
    """
    if not sections:
        return
    page, text = (Path(sections["paths"]["reports"], name) for name in ("findings.html", "findings.md"))
    if text.exists():
        where = f"The page with its figures is `{page.resolve()}`.\n\n"
        create_markdown_artifact(where + text.read_text(encoding="utf-8"), key="findings", description="findings")
    views = add_views(open_client())
    for family in sorted({run["family"] for run in _runs(sections).values()}):
        if address := views.get(experiment_name(sections["profile"], family)):
            create_link_artifact(
                f"{viewer_address()}/{address}", f"MLflow: {family}", key=f"frontier-{_artifact_key(family)}",
                description=f"L0 against normalised MSE of {family} in MLflow, while `make ui` runs",
            )  # fmt: skip


def _artifact_key(name: str) -> str:
    """Prefect's artifact keys hold lower-case letters, digits and dashes only."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.findings", description=__doc__)
    parser.add_argument("--pipeline", default="dvc.yaml", help="the profile's dvc.yaml")
    parser.add_argument("--workers", type=int, default=1, help="stages at the same time")
    parser.add_argument("--beside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.workers < 1 or not Path(options.pipeline).exists():
        print(f"--workers {options.workers} --pipeline {options.pipeline}: give one worker or more and a dvc.yaml that "
              "exists", file=sys.stderr)  # fmt: skip
        return 2
    if options.beside:
        return _run(options.pipeline, options.workers)
    try:
        interrupt_on_termination()
        with prefect_server() as address:
            print(f"Prefect  {address.removesuffix('/api')}", flush=True)
            return _run_beside(address, ["--pipeline", options.pipeline, "--workers", str(options.workers)])
    except NoServerError as error:
        print(f"findings: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("findings: interrupted; run the same command to go on", file=sys.stderr)
        return 130


def _run(pipeline: str, workers: int) -> int:
    """The flow, reporting to the server that PREFECT_API_URL named when this process began; the exit code."""
    reaped = reap_killed_runs()
    if reaped:
        print(f"marked {reaped} killed flow runs as crashed", flush=True)
    runner: Any = ThreadPoolTaskRunner(max_workers=workers)
    try:
        with tags(*process_tags()):
            findings.with_options(task_runner=runner)(pipeline, workers)
    except StageFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run_beside(address: str, arguments: list[str]) -> int:
    """Run again beside a server: Prefect reads its address when it is imported, and reports until the process ends.

    In a group of processes of its own, so that an interrupt - Ctrl-C or SIGTERM, whoever sent it - is passed on once
    to the flow, to DVC and to the stages, which write a checkpoint and end; then the server ends too.
    """
    command = [sys.executable, "-m", "flows.findings", *arguments, "--beside", address]
    process = subprocess.Popen(command, env=os.environ | {"PREFECT_API_URL": address}, process_group=0)
    try:
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        raise


if __name__ == "__main__":
    raise SystemExit(_main())
