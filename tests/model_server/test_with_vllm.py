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
from typing import Any

import httpx
import psutil
import pytest

from model_server.deploy import run
from parampara.errors import InvalidRequest
from parampara.progress import SilentProgress
from parampara.schemas.stages import DeployConfig, DeployParams, DeployResult, Gate
from standalone.places import vllm_command
from tests.compressed import compress
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "kp" / "base"
RECORDED = Path(__file__).with_name("recorded")

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

    def config(self, model: Path, *, generation: int, **more: Any) -> DeployConfig:
        alias = more.pop("alias", "kp")
        return DeployConfig(
            **more,
            artifact_id=f"sha256:{generation}",
            model_path=model,
            model_name=f"ft:tiny:org:kp:{generation}",
            alias=alias,
            generation=generation,
            model_server_url=self.url,
            params=DeployParams(alias=alias, ready_timeout_seconds=200),
        )

    def deploy(self, model: Path, workdir: Path, *, generation: int, **more: Any) -> DeployResult:
        return run(self.config(model, generation=generation, **more), workdir=workdir, progress=SilentProgress())

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


def evaluation(folder: Path, model: str) -> Path:
    """An evaluation of ``model`` as the deploy stage gets it (see test_live)."""
    output = folder / f"evaluation-{model}"
    output.mkdir()
    shutil.copyfile(RECORDED / f"expected_{model}.json", output / "expectations.json")
    return output


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


def test_the_model_that_was_evaluated_is_measured_and_accepted(server: Server, tmp_path: Path) -> None:
    gates = [Gate(metric="parity.live.generation_config", min=1), Gate(metric="serving.openai_format", min=1)]
    gates += [Gate(metric="serving.tokens_per_second", min=0.1), Gate(metric="parity.live.kl", max=1e-3)]
    result = server.deploy(MODEL, tmp_path, generation=1, evaluation=evaluation(tmp_path, "base"), gates=gates)
    assert [gate.metric for gate in result.gates if not gate.passed] == []
    assert {"parity.live.top1", "parity.live.chat_template"} <= {gate.metric for gate in result.gates}  # the bounds of params.live
    assert (result.decision, result.not_measured) == ("promote", None)
    assert server.report()["status"] == "ready"


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


def test_a_stale_endpoint_is_held_and_what_it_serves_goes_on(server: Server, tmp_path: Path) -> None:
    """vLLM serves the base under the name of a model that was tuned from it."""
    result = server.deploy(MODEL, tmp_path, generation=1, alias="other", evaluation=evaluation(tmp_path, "tuned"))
    assert result.decision == "hold"
    assert [gate.metric for gate in result.gates if not gate.passed] == ["parity.live.top1"]
    assert "parity.live.top1" in server.report()["error"]
    assert server.ask("ft:tiny:org:kp:1").status_code == 200


def test_a_wrong_scale_and_a_swapped_template_are_held_and_the_model_before_serves_again(server: Server, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = compress(MODEL, tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight_scale"] *= 2
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    template = damaged / "chat_template.jinja"
    template.write_text(template.read_text().replace("|>assistant<|", "|>model<|"))
    result = server.deploy(damaged, tmp_path, generation=3, evaluation=evaluation(tmp_path, "int8"))
    assert result.decision == "hold"
    assert [gate.metric for gate in result.gates if not gate.passed] == ["parity.live.top1", "parity.live.chat_template"]
    assert (server.report()["status"], server.report()["generation"]) == ("failed", 3)
    until(lambda: server.report()["serving"] == "ft:tiny:org:kp:1", 200)
    assert server.ask("ft:tiny:org:kp:1").status_code == 200


def test_a_killed_supervisor_leaves_no_engine_and_the_next_one_serves_the_same_model(server: Server) -> None:
    processes = server.engine_processes()
    assert len(processes) >= 3
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    until(lambda: not [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE], 60)
    server.start()
    until(lambda: server.report()["serving"] == "ft:tiny:org:kp:1", 200)
    assert server.ask("ft:tiny:org:kp:1").status_code == 200
