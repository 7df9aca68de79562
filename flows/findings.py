"""A whole profile as one Prefect flow, for long runs: several trainings at once, retries, progress in the Prefect UI.

DVC stays the only record of outputs. Every task runs its stage through ``dvc repro --single-item``, so ``dvc status``
is clean afterwards; DVC lets go of its lock while a stage's command runs, which is what lets two run at once.
"""

import argparse
import os
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
from flows.servers import prefect_server

__all__ = ["findings", "stage_graph"]

_WRONG_PARAMETERS = "exited with 2"
_RETRIES = 2


class StageFailedError(RuntimeError):
    """A stage ended with an error; the message ends with its last lines."""


def stage_graph(pipeline: Path) -> dict[str, set[str]]:
    """Every stage of one dvc.yaml by its DVC address, in the order DVC would run them, with the stages it waits for."""
    from dvc.repo import Repo
    from networkx import topological_sort

    with Repo() as repo:
        graph = repo.index.graph.reverse()
        own = [stage for stage in topological_sort(graph) if Path(stage.path).resolve() == pipeline.resolve()]
        return {stage.addressing: {needed.addressing for needed in graph.predecessors(stage)} for stage in own}


def _worth_another_try(task: Any, task_run: Any, state: Any) -> bool:
    """Wrong parameters and files stay wrong; everything else may have been the machine."""
    return _WRONG_PARAMETERS not in (state.message or "")


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
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if result.returncode:
        raise StageFailedError(f"{stage}: " + "\n".join(lines[-20:]))
    skipped = any("didn't change, skipping" in line for line in lines)
    get_run_logger().info("%s: %s", stage, "nothing to do" if skipped else f"done, log in {log}")
    return "unchanged" if skipped else "done"


@flow(name="findings", flow_run_name="findings {pipeline}", persist_result=False)
def findings(pipeline: str, workers: int) -> dict[str, str]:
    """Run every stage of a pipeline as soon as the stages it needs are done, ``workers`` at a time."""
    logger = get_run_logger()
    needs = stage_graph(Path(pipeline))
    progress: Any = create_progress_artifact(progress=0.0, key="stages", description=f"stages of {pipeline}")
    outcome: dict[str, str] = {}
    running: dict[PrefectFuture[str], str] = {}
    waiting = list(needs)
    while waiting or running:
        ready = [
            stage for stage in waiting if all(outcome.get(needed) in ("done", "unchanged") for needed in needs[stage])
        ]
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
    _show_results(Path(pipeline))
    failed = [stage for stage, result in outcome.items() if result == "failed"]
    if failed:
        raise StageFailedError(
            f"{', '.join(failed)} failed; {len(waiting)} stages that need them were not run. Logs: work/logs"
        )
    return outcome


def _show_results(pipeline: Path) -> None:
    """The table of runs and the findings as artifacts, as far as they exist."""
    parameters = pipeline.with_name("params.yaml")
    sections = yaml.safe_load(parameters.read_text(encoding="utf-8")) if parameters.exists() else {}
    reports = sections.get("paths", {}).get("reports")
    if reports is None:
        return
    rows = [{"run": run, **_summary(Path(reports), run)} for run in sections.get("runs") or {}]
    create_table_artifact(table=rows, key="runs", description=f"trainings of the {sections.get('profile')} profile")
    page, text = Path(reports, "findings.html"), Path(reports, "findings.md")
    if text.exists():
        create_markdown_artifact(text.read_text(encoding="utf-8"), key="findings", description="findings")
        create_link_artifact(page.resolve().as_uri(), "findings.html", key="report", description="the findings page")


def _summary(reports: Path, run: str) -> Mapping[str, Any]:
    path = reports / "summaries" / f"{run}.json"
    return read_json(path) if path.exists() else {}


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.findings", description=__doc__)
    parser.add_argument("--pipeline", default="dvc.yaml", help="the profile's dvc.yaml")
    parser.add_argument("--workers", type=int, default=1, help="stages at the same time")
    options = parser.parse_args()
    if options.workers < 1 or not Path(options.pipeline).exists():
        print(f"--workers {options.workers} --pipeline {options.pipeline}: give one worker or more and a dvc.yaml that "
              "exists", file=sys.stderr)  # fmt: skip
        return 2
    if not os.environ.get("PREFECT_API_URL"):
        return _with_server(["--pipeline", options.pipeline, "--workers", str(options.workers)])
    reaped = reap_killed_runs()
    if reaped:
        print(f"marked {reaped} killed flow runs as crashed", flush=True)
    runner: Any = ThreadPoolTaskRunner(max_workers=options.workers)
    try:
        with tags(*process_tags()):
            findings.with_options(task_runner=runner)(options.pipeline, options.workers)
    except StageFailedError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _with_server(arguments: list[str]) -> int:
    """Run again beside a server: Prefect reads its address when it is imported, and reports until the process ends."""
    with prefect_server() as address:
        print(f"Prefect  {address.removesuffix('/api')}", flush=True)
        command = [sys.executable, "-m", "flows.findings", *arguments]
        return subprocess.run(command, env=os.environ | {"PREFECT_API_URL": address}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(_main())
