"""The two viewers on 127.0.0.1: Prefect (what runs) and MLflow (what came out). ``make ui`` runs this file."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from flows._runtime import repository_root
from flows._tracking import database_uri, open_client
from flows._views import add_views

__all__ = ["mlflow_server", "prefect_server"]

_HOST = "127.0.0.1"
_PATIENCE_SECONDS = 120
_VIEW_SECONDS = 10


@contextmanager
def prefect_server(port: int = 4200) -> Iterator[str]:
    """The API address of a Prefect server: one that PREFECT_API_URL names, one that runs already, or a new one."""
    configured = os.environ.get("PREFECT_API_URL")
    address = configured or f"http://{_HOST}:{port}/api"
    if configured or _answers(f"{address}/health"):
        yield address
        return
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", _HOST, "--port", str(port)]
    with _running("prefect", command, f"{address}/health"):
        yield address


@contextmanager
def mlflow_server(port: int = 5000) -> Iterator[str]:
    """The address of an MLflow server over the repository's database."""
    address = f"http://{_HOST}:{port}"
    if _answers(f"{address}/health"):
        yield address
        return
    open_client()
    command = [sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1",
               "--backend-store-uri", database_uri(), "--serve-artifacts",
               "--artifacts-destination", (repository_root() / "mlartifacts").as_uri()]  # fmt: skip
    with _running("mlflow", command, f"{address}/health"):
        yield address


@contextmanager
def _running(name: str, command: list[str], health: str) -> Iterator[None]:
    """A server process that answers; it ends with the block. OSError when it does not come up."""
    log = repository_root() / "work" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=repository_root())
        try:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            while not _answers(health):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"{name} did not start at {health}; is the port taken? Its log is {log}")
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _main() -> None:
    os.chdir(Path(__file__).resolve().parents[1])  # prefect.toml is read from the current directory only
    with ExitStack() as stack:
        api = stack.enter_context(prefect_server())
        print(f"Prefect  {api.removesuffix('/api')}", flush=True)
        viewer = stack.enter_context(mlflow_server())
        print(f"MLflow   {viewer}", flush=True)
        print(f"Stages report to Prefect after: export PREFECT_API_URL={api}", flush=True)
        print("Ctrl-C stops both.", flush=True)
        client, shown = open_client(), set[str]()
        try:
            while True:  # experiments may come while the servers run
                for name, address in add_views(client).items():
                    if name not in shown:
                        print(f"Frontier of {name}: {viewer}/{address}", flush=True)
                        shown.add(name)
                time.sleep(_VIEW_SECONDS)
        except KeyboardInterrupt:
            print("stopped")


if __name__ == "__main__":
    _main()
