"""The supervisor with the real vLLM: served under its name, restarted when it dies, rolled back, restored, gone without a trace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from model_server.deploy import run
from parampara.errors import InvalidRequest
from parampara.progress import SilentProgress
from parampara.schemas.stages import DeployConfig, DeployParams
from standalone.places import vllm_command
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "kp" / "base"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


class Server:
    """``python -m model_server serve`` with its own home and ports."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.port, self.vllm_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.vllm_url = f"http://127.0.0.1:{self.vllm_port}"
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ,
            "PARAMPARA_HOME": str(self.home),
            "PARAMPARA_MODEL_SERVER__PORT": str(self.port),
            "PARAMPARA_MODEL_SERVER__VLLM_PORT": str(self.vllm_port),
            "PARAMPARA_MODEL_SERVER__CPU": "true",
            "PARAMPARA_MODEL_SERVER__VLLM_COMMAND": json.dumps(vllm_command(ROOT)),
        }
        self.home.mkdir(exist_ok=True)
        with (self.home / "serve.log").open("ab") as sink:
            self.process = subprocess.Popen([sys.executable, "-m", "model_server", "serve"], env=environment, stdout=sink, stderr=sink)
        until(lambda: self.process.poll() is None and self.answers(), 60)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def report(self) -> dict:
        return httpx.get(f"{self.url}/deployment").json()

    def config(self, model: Path, *, generation: int) -> DeployConfig:
        return DeployConfig(
            artifact_id=f"sha256:{generation}",
            model_path=model,
            model_name=f"ft:tiny:org:kp:{generation}",
            alias="kp",
            generation=generation,
            model_server_url=self.url,
            params=DeployParams(alias="kp", ready_timeout_seconds=200),
        )

    def deploy(self, model: Path, workdir: Path, *, generation: int):
        return run(self.config(model, generation=generation), workdir=workdir, progress=SilentProgress())

    def ask(self, model: str) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "Which day comes after Sunday?"}], "max_tokens": 8}
        return httpx.post(f"{self.vllm_url}/v1/chat/completions", json=body, timeout=60)

    def engine_processes(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.process.pid).children(recursive=True) if child.is_running()]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("model_server"))
    yield server
    if server.process.poll() is None:
        server.process.terminate()
        server.process.wait(90)


def until(happened: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_deployment_is_ready_once_it_has_answered_under_its_own_name(server: Server, tmp_path: Path) -> None:
    result = server.deploy(MODEL, tmp_path, generation=1)
    assert result.model_name == "ft:tiny:org:kp:1"
    assert result.url == server.vllm_url
    assert server.report()["status"] == "ready"
    answer = server.ask("ft:tiny:org:kp:1")
    assert answer.json()["model"] == "ft:tiny:org:kp:1"
    assert server.ask("somebody-else").status_code == 404


def test_the_same_deployment_again_starts_nothing(server: Server, tmp_path: Path) -> None:
    before = {process.pid for process in server.engine_processes()}
    began = time.monotonic()
    server.deploy(MODEL, tmp_path, generation=1)
    assert time.monotonic() - began < 10
    assert {process.pid for process in server.engine_processes()} == before


def test_an_engine_that_is_killed_comes_back(server: Server) -> None:
    engine = next(process for process in server.engine_processes() if "EngineCore" in " ".join(process.cmdline()))
    engine.kill()
    until(lambda: server.report()["restarts"] == 1, 60)
    assert server.report()["error"]
    until(lambda: server.report()["status"] == "ready", 200)
    assert server.ask("ft:tiny:org:kp:1").status_code == 200


def test_a_model_that_cannot_be_loaded_is_refused_and_the_one_before_serves_on(server: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(MODEL, broken)
    (broken / "model.safetensors").write_bytes((MODEL / "model.safetensors").read_bytes()[:100_000])
    with pytest.raises(InvalidRequest) as caught:
        server.deploy(broken, tmp_path, generation=2)
    assert caught.value.code == "deployment_failed"
    report = server.report()
    assert (report["status"], report["generation"]) == ("failed", 2)
    assert report["log_tail"]
    until(lambda: server.report()["serving"] == "ft:tiny:org:kp:1", 200)
    assert server.ask("ft:tiny:org:kp:1").status_code == 200
    with pytest.raises(InvalidRequest) as stale:
        server.deploy(MODEL, tmp_path, generation=1)
    assert stale.value.code == "stale_generation"


def test_a_killed_supervisor_leaves_no_engine_and_the_next_one_serves_the_same_model(server: Server) -> None:
    processes = server.engine_processes()
    assert len(processes) >= 3
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    until(lambda: not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE], 60)
    server.start()
    until(lambda: server.report()["serving"] == "ft:tiny:org:kp:1", 200)
    assert server.ask("ft:tiny:org:kp:1").status_code == 200
