"""The gateway before a real vLLM: that what the scripted model server plays is what the real one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from parampara.db.models import Alias
from tests.conftest import free_port
from tests.gateway.conftest import MODEL, Running
from tests.gateway.library import platform, store
from tests.gateway.servers import wait_until
from tests.tiny_models import make_model

__all__ = ["platform", "store"]
PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the vLLM environment (make setup)"),
    pytest.mark.timeout(400),
]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ARGUMENTS = "--dtype bfloat16 --enforce-eager --kv-cache-memory-bytes 67108864 --max-model-len 1024 --max-num-seqs 8".split()


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory, port = tmp_path_factory.mktemp("vllm"), free_port()
    model = make_model(directory / "model", hidden=128, max_position_embeddings=1024)  # heads of 32, the least that vLLM serves on a CPU
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", MODEL]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *ARGUMENTS],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while not _healthy(url):
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start"
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


@pytest.fixture
def real(platform: Running, store: str, vllm_url: str) -> Running:
    """The grounded alias ``kp``, answered by vLLM."""
    with platform.sessions.begin() as session:
        session.get_one(Alias, "kp").url = vllm_url
    time.sleep(0.6)
    return platform


QUESTION: Any = [{"role": "user", "content": "How many years does Ketu rule?"}]


def test_every_form_of_answer_with_the_strict_sdk(real: Running) -> None:
    chat = real.sdk.chat.completions
    plain = chat.create(model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, seed=1, logprobs=True, top_logprobs=2)
    assert plain.model == MODEL
    assert plain.usage is not None
    assert plain.usage.completion_tokens == 8
    assert plain.choices[0].logprobs is not None
    chunks = list(
        chat.create(model=MODEL, messages=QUESTION, max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage is not None
    two = chat.create(model=MODEL, messages=QUESTION, max_tokens=4, n=2, stop=["\n"], top_p=0.9, presence_penalty=0.1)
    assert [choice.index for choice in two.choices] == [0, 1]
    raw = real.sdk.completions.create(model=MODEL, prompt="Ketu rules", max_tokens=5, temperature=0)
    assert raw.usage is not None
    assert raw.usage.completion_tokens == 5


def test_grounded_answers_fit_the_real_window(real: Running) -> None:
    answer = real.sdk.chat.completions.create(model="kp", messages=QUESTION, max_tokens=16)
    message: Any = answer.choices[0].message.to_dict()
    assert message["context"]["citations"][0]["filename"] == "dasha.md"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens + 16 <= 1024
    assert answer.usage.prompt_tokens > 100
    long = [{"role": "user", "content": "Ketu rules seven years. " * 40}]
    squeezed = real.ask(messages=long, max_tokens=900).json()
    assert squeezed["usage"]["prompt_tokens"] + squeezed["usage"]["completion_tokens"] <= 1024
    assert squeezed["choices"][0]["message"]["context"]["dropped"] > 0
    chunks = list(real.sdk.chat.completions.create(model="kp", messages=QUESTION, max_tokens=16, stream=True))
    [citing] = [chunk for chunk in chunks if "annotations" in chunk.choices[0].delta.to_dict()]
    assert citing is chunks[-2]
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_what_vllm_refuses_comes_back_as_the_client_s_mistake(real: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        real.sdk.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "years " * 2000}])
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(real: Running, vllm_url: str, stream: bool) -> None:
    """vLLM counts a request that it has brought to its end, and not one that nobody waits for any more."""
    address, request = urlsplit(real.url), {"model": MODEL, "messages": QUESTION, "stream": stream, "repetition_penalty": 1.3}
    completed = _total(vllm_url, "vllm:request_success_total")
    real.http.post("/v1/chat/completions", json={**request, "max_tokens": 3})
    wait_until(lambda: _total(vllm_url, "vllm:request_success_total") == completed + 1)
    body = json.dumps({**request, "max_tokens": 900})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {real.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((str(address.hostname), address.port or 0)) as client:
        client.sendall((head + body).encode())
        wait_until(lambda: _total(vllm_url, "vllm:num_requests_running") == 1)
    wait_until(lambda: _total(vllm_url, "vllm:num_requests_running") == 0)
    assert _total(vllm_url, "vllm:request_success_total") == completed + 1


def _total(url: str, metric: str) -> int:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{metric}{{")))


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False
