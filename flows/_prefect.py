"""The Prefect side of a stage: a flow run that reports to the server, and the clearing of runs that were killed."""

import os
import socket
from collections.abc import Callable
from typing import Any

from crosshead.io.files import process_lives
from flows._runtime import Stage

__all__ = ["process_tags", "reap_killed_runs", "run_as_flow"]


def process_tags() -> list[str]:
    """Tags by which a later process can tell that this one is gone."""
    return [f"host:{socket.gethostname()}", f"pid:{os.getpid()}"]


def run_as_flow(body: Callable[[Stage], None], stage: Stage) -> None:
    """Run the stage as a Prefect flow. DVC is the only cache: Prefect keeps no results."""
    import prefect

    def stage_flow(name: str, profile: str) -> None:
        body(stage)

    make_flow: Any = prefect.flow
    with prefect.tags(f"dvc-stage:{stage.name}", *process_tags()):
        run = make_flow(stage_flow, name=body.__name__, flow_run_name=f"{stage.profile} {stage.name}",
                        description=body.__doc__, validate_parameters=False)  # fmt: skip
        run(name=stage.name, profile=stage.profile)


def reap_killed_runs() -> int:
    """Mark flow runs of this host, and their tasks, as crashed whose process no longer lives.

    The server still thinks they run. Returns the number of flow runs.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
    from prefect.client.schemas.sorting import FlowRunSort, TaskRunSort
    from prefect.states import Crashed

    host = f"host:{socket.gethostname()}"
    unfinished = {"type": {"any_": ["PENDING", "RUNNING"]}}
    killed = Crashed(message="its process was killed")
    reaped = 0
    with get_client(sync_client=True) as client:
        running = FlowRunFilter.model_validate({"state": {"type": {"any_": ["RUNNING"]}}, "tags": {"all_": [host]}})
        newest_first, any_order = FlowRunSort.START_TIME_DESC, TaskRunSort.ID_DESC
        for flow_run in client.read_flow_runs(flow_run_filter=running, sort=newest_first, limit=200):
            pids = [int(tag.removeprefix("pid:")) for tag in flow_run.tags if tag.startswith("pid:")]
            if any(process_lives(pid) for pid in pids):
                continue
            own = FlowRunFilter.model_validate({"id": {"any_": [flow_run.id]}})
            tasks = TaskRunFilter.model_validate({"state": unfinished})
            for task_run in client.read_task_runs(
                flow_run_filter=own, task_run_filter=tasks, sort=any_order, limit=200
            ):
                client.set_task_run_state(task_run.id, killed, force=True)
            client.set_flow_run_state(flow_run.id, killed, force=True)
            reaped += 1
    return reaped
