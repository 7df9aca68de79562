"""The two viewers: they answer while they are wanted, leave no process behind, and say so when they cannot start."""

import os
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

pytest.importorskip("prefect")
pytest.importorskip("mlflow")

from flows import servers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores and logs go to a temporary directory, by the project's own Prefect settings."""
    shutil.copy2(ROOT / "prefect.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def another_program() -> Iterator[int]:
    """The port of a web server that says 200 to everything."""

    class Always(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Always) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read().decode()


def processes() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def test_prefect_answers_and_ends_with_its_block(free_port: int):
    before = processes()
    with servers.prefect_server(free_port) as api:
        assert api == f"http://127.0.0.1:{free_port}/api"
        assert get(f"{api}/health") == "true"
        started = processes() - before
        with servers.prefect_server(free_port) as second:
            assert second == api
            assert processes() - before == started, "a server that runs already is used"
        assert get(f"{api}/health") == "true"
    assert started
    assert not [process for process in started if process.is_running()]
    assert Path(".prefect", "prefect.db").exists()


def test_mlflow_answers_over_the_repository_s_database_and_ends_with_its_helpers(free_port: int):
    servers.open_client().create_experiment("superposition")
    before = processes()
    with servers.mlflow_server(free_port) as address:
        assert address == f"http://127.0.0.1:{free_port}"
        assert get(f"{address}/health") == "OK"
        assert "superposition" in get(f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=superposition")
        started = processes() - before
    assert len(started) > 1, "the server of this version has no helpers; this test can be simpler"
    assert not [process for process in started if process.is_running()]


@pytest.mark.parametrize("start", [servers.prefect_server, servers.mlflow_server])
def test_a_port_that_is_taken_is_named_with_a_way_out(start, another_program: int):
    option = start.__name__.replace("_server", "-port")
    with (
        pytest.raises(servers.NoServerError, match=f"port {another_program} .* is taken .* --{option}"),
        start(another_program),
    ):
        pass


def test_a_named_server_that_does_not_answer_is_named(free_port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port}/api")
    with pytest.raises(servers.NoServerError, match=f"PREFECT_API_URL=.*{free_port}/api does not answer; start"):
        servers.prefect_server().__enter__()


def test_a_named_server_that_answers_is_used(another_program: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{another_program}/api")
    before = processes()
    with servers.prefect_server() as api:
        assert api == os.environ["PREFECT_API_URL"]
        assert processes() == before


def test_a_server_that_dies_at_once_is_reported_with_its_log(free_port: int, tmp_path: Path):
    failing = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with pytest.raises(servers.NoServerError, match=r"thing ended with 1 .*work/thing\.log says why"):
        servers._running("thing", free_port, failing, f"http://127.0.0.1:{free_port}/", "OK").__enter__()
    assert "no such thing" in (tmp_path / "work" / "thing.log").read_text()


@pytest.mark.parametrize(
    "command", [["flows.servers", "--prefect-port", "{port}"], ["flows.findings", "--pipeline", "dvc.yaml"]], ids=str
)
def test_without_a_server_there_is_one_message_and_exit_code_2(
    command: list[str], another_program: int, free_port: int, monkeypatch: pytest.MonkeyPatch
):
    Path("dvc.yaml").touch()
    if "findings" in command[0]:
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port}/api")
    filled = [part.format(port=another_program) for part in command]
    result = subprocess.run([sys.executable, "-m", *filled], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{command[0].removeprefix('flows.')}: ")
