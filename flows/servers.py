"""The two viewers on 127.0.0.1: Prefect (what runs) and MLflow (what came out). ``make ui`` runs this file."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

from flows._runtime import repository_root
from flows._tracking import database_uri, open_client
from flows._views import add_views

__all__ = [
    "NoServerError",
    "interrupt_on_termination",
    "mlflow_server",
    "prefect_server",
    "viewer_address",
]

PREFECT_PORT = 4200
MLFLOW_PORT = 5000
_HOST = "127.0.0.1"
_PATIENCE_SECONDS = 120
_GOODBYE_SECONDS = 10
_VIEW_SECONDS = 10
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy stands before our own servers


class NoServerError(OSError):
    """A server that is needed does not answer and cannot be started; the message says why and what to do."""


@contextmanager
def prefect_server(port: int = PREFECT_PORT) -> Iterator[str]:
    """The API address of a Prefect server: one that PREFECT_API_URL names, one that runs already, or a new one.

    NoServerError when the named one does not answer or a new one does not start.
    """
    own = f"http://{_HOST}:{port}/api"
    named = os.environ.get("PREFECT_API_URL") or own
    if named != own:
        if not _reachable(f"{named}/health"):
            raise NoServerError(f"PREFECT_API_URL={named} does not answer; start that server, or unset PREFECT_API_URL "
                                f"and one is started on port {port}")  # fmt: skip
        yield named
        return
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", _HOST, "--port", str(port)]
    with _running("prefect", port, command, f"{own}/health", "true"):
        yield own


@contextmanager
def mlflow_server(port: int = MLFLOW_PORT) -> Iterator[str]:
    """The address of an MLflow server over the repository's database: one that runs already, or a new one.

    NoServerError when it does not start.
    """
    address = viewer_address(port)
    open_client()  # creates the database, which a server and a training must not do at the same time
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1",
               "--backend-store-uri", database_uri(), "--serve-artifacts",
               "--artifacts-destination", (repository_root() / "mlartifacts").as_uri()]  # fmt: skip
    # Background jobs serve features of hosted models; they would be seven more processes.
    with _running("mlflow", port, command, f"{address}/health", "OK", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}):
        yield address


def viewer_address(port: int = MLFLOW_PORT) -> str:
    """Where ``make ui`` serves MLflow."""
    return f"http://{_HOST}:{port}"


@contextmanager
def _running(
    name: str, port: int, command: list[str], health: str, healthy: str, variables: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A server that answers ``healthy`` at ``health``: the one there is, or a process that ends with the block."""
    if _answers(health, healthy):
        yield
        return
    if _taken(port):
        raise NoServerError(
            f"{name} cannot start: port {port} of {_HOST} is taken by another program; end that program, or choose "
            f"another port: python -m flows.servers --{name}-port {port + 1}"
        )
    log = repository_root() / "work" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=repository_root(),
            env=os.environ | (variables or {}), process_group=0,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _answers(health, healthy):
                if process.poll() is not None:
                    raise NoServerError(f"{name} ended with {process.returncode} before it answered at {health}; "
                                        f"{log} says why")  # fmt: skip
                if time.monotonic() > deadline:
                    raise NoServerError(f"{name} does not answer at {health} after {_PATIENCE_SECONDS} seconds; "
                                        f"{log} may say why")  # fmt: skip
                time.sleep(0.5)
            yield
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a server with its helpers: a group of processes of its own, which does not end with its leader."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GOODBYE_SECONDS
        with suppress(ProcessLookupError, PermissionError):  # macOS: PermissionError for processes that have ended
            os.killpg(process.pid, order)
            while time.monotonic() < deadline:
                process.poll()
                os.killpg(process.pid, 0)
                time.sleep(0.1)
    process.wait()


def _answers(address: str, healthy: str) -> bool:
    """Whether the server at this address is ours: another program may answer there too."""
    try:
        with _DIRECT.open(address, timeout=2) as answer:
            return answer.status == 200 and answer.read(100).decode(errors="replace").strip() == healthy
    except (OSError, HTTPException):  # the second: something that does not speak HTTP
        return False


def _reachable(address: str) -> bool:
    """Whether a server answers, be it that we may not look."""
    try:
        with urllib.request.urlopen(address, timeout=10):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError, HTTPException):
        return False


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do: a port just left is free
        try:
            probe.bind((_HOST, port))
        except OSError:
            return True
    return False


def interrupt_on_termination() -> None:
    """Let SIGTERM and a closed terminal end this process as Ctrl-C does, so that its servers end with it."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup means it
            signal.signal(number, interrupt)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.servers", description=__doc__)
    parser.add_argument("--prefect-port", type=int, default=PREFECT_PORT)
    parser.add_argument("--mlflow-port", type=int, default=MLFLOW_PORT)
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parents[1])  # prefect.toml is read from the current directory only
    interrupt_on_termination()
    try:
        _serve(options.prefect_port, options.mlflow_port)
    except NoServerError as error:
        print(f"servers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped")
    return 0


def _serve(prefect_port: int, mlflow_port: int) -> None:
    """Run both until interrupted."""
    with ExitStack() as stack:
        api = stack.enter_context(prefect_server(prefect_port))
        print(f"Prefect  {api.removesuffix('/api')}", flush=True)
        viewer = stack.enter_context(mlflow_server(mlflow_port))
        print(f"MLflow   {viewer}", flush=True)
        print(f"Stages report to Prefect after: export PREFECT_API_URL={api}", flush=True)
        print("Ctrl-C stops both.", flush=True)
        client, shown = open_client(), set[str]()
        while True:  # experiments may come while the servers run
            for name, address in add_views(client).items():
                if name not in shown:
                    print(f"Frontier of {name}: {viewer}/{address}", flush=True)
                    shown.add(name)
            time.sleep(_VIEW_SECONDS)


if __name__ == "__main__":
    raise SystemExit(_main())
