"""Quantized models in real vLLM: they load, LLM.int8 through vllm-bnb-plugin, and give the probabilities that transformers gives.

W8A16 is not among them: vLLM's CPU build has no kernel for it ("uint8b128"). ``test_compressed.py`` loads it with transformers.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from parampara.progress import SilentProgress
from parampara.schemas.stages import QuantizeConfig, QuantizeParams
from quantizer.quantize import run
from tests.quantizer.llmcompressor import PYTHON, needs_llmcompressor
from tests.quantizer.trained import make_trained
from tests.tiny_models import make_model

VLLM_PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
HEAD_DIM_32 = 128
"""Hidden size of a tiny model with four heads of 32: vLLM's CPU attention has no kernel for 16."""
PROMPT = [0, 20, 30, 40, 50, 60, 70, 80, 90]
START_SECONDS = 200
NATS = {"bitsandbytes": 0.15, "w8a8": 0.5, "gptq": 0.5, "smoothquant": 0.5, "fp8": 0.15}
"""How far a log-probability may be from transformers': without VNNI, vLLM's INT8 kernel (oneDNN's) adds two products in 16 bits, which
saturate. With codes up to 127 that is 0.35 here, with codes up to 100 it is 0.1 (docs/quantization.md); with the unrounded weights 0.003."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.skipif(not VLLM_PYTHON.exists(), reason="no .venv-vllm here")]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("parent"), hidden=HEAD_DIM_32, dtype="float16")


CALIBRATED = [pytest.param(scheme, marks=needs_llmcompressor) for scheme in ("gptq", "smoothquant")]


@pytest.fixture(scope="module", params=["bitsandbytes", "w8a8", "fp8", *CALIBRATED])
def model(request: pytest.FixtureRequest, parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    params = QuantizeParams(schemes=[request.param], max_chunks=4, max_questions=3, max_degradation=0.05)  # the weights are random
    config = QuantizeConfig(model=parent, params=params)
    if request.param in ("gptq", "smoothquant"):  # calibrated on rows
        config = make_trained(tmp_path_factory.mktemp("rows")).model_copy(update={"model": parent, "params": params})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LLMCOMPRESSOR_PYTHON", str(PYTHON))
        return run(config, workdir=tmp_path_factory.mktemp("work"), progress=SilentProgress()).output


@pytest.fixture(scope="module")
def vllm_url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "0-1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    options = ["--enforce-eager", "--kv-cache-memory-bytes", "67108864", "--max-model-len", "256", "--max-num-seqs", "4"]
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), *options], env=environment, stdout=file, stderr=file
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def test_vllm_gives_the_same_probabilities_as_transformers_and_nearly_the_parents(parent: Path, model: Path, vllm_url: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    choice = _post(f"{vllm_url}/v1/completions", body)["choices"][0]
    served = [entry[str(token)]["logprob"] for token, entry in zip(PROMPT[1:], choice["prompt_logprobs"][1:], strict=True)]
    expected = _log_probs(model)
    scheme = json.loads((model / "quantize.json").read_text(encoding="utf-8"))["scheme"]
    assert served == pytest.approx(expected, abs=NATS[scheme])
    assert served == pytest.approx(_log_probs(parent), abs=0.5)
    assert max(expected) - min(expected) > 1  # so the bounds above can fail


def _log_probs(model: Path) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, device_map={"": "cpu"})
    with torch.inference_mode():
        log_probs = loaded(torch.tensor([PROMPT])).logits[0].float().log_softmax(-1)
    return [float(log_probs[position, token]) for position, token in enumerate(PROMPT[1:])]


def test_vllm_answers_a_chat(vllm_url: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Ketu rules"}], "max_tokens": 6, "temperature": 0}
    answer = _post(f"{vllm_url}/v1/chat/completions", body)
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["choices"][0]["message"]["role"] == "assistant"


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)
