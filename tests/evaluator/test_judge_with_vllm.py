"""The judge's request before a real vLLM: that it is taken as it is sent, and that the reply is read."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from evaluator import judge_client
from evaluator.judge import Judge, judge_items, metrics, require_answering
from evaluator.judge_client import Case
from evaluator.meter import Meter
from parampara.errors import InvalidRequest
from parampara.progress import SilentProgress
from parampara.schemas.stages import JudgeEndpoint, JudgeParams
from tests.conftest import free_port
from tests.evaluator.test_judge import measured_answers, questions
from tests.tiny_models import make_model

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs the vLLM environment (make setup)"),
    pytest.mark.timeout(500),
]
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ARGUMENTS = "--dtype bfloat16 --enforce-eager --kv-cache-memory-bytes 134217728 --max-model-len 4096 --max-num-seqs 4".split()
NO_SPACES = '{"backend": "xgrammar", "disable_any_whitespace": true}'
"""Between JSON's signs the grammar admits spaces without end, and random weights find none."""


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JudgeEndpoint]:
    directory, port = tmp_path_factory.mktemp("vllm"), free_port()
    model = make_model(directory / "model", hidden=128, max_position_embeddings=4096)  # heads of 32, the least that vLLM serves on a CPU
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "grader"]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *command,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                *ARGUMENTS,
                "--api-key",
                "sk-judge",
                "--structured-outputs-config",
                NO_SPACES,
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 400
        while not _healthy(url):
            assert process.poll() is None, (directory / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start"
            time.sleep(0.5)
        yield JudgeEndpoint(base_url=f"{url}/v1", timeout_seconds=120, concurrency=4)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_real_vllm_grades_by_the_schema(endpoint: JudgeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are random: the schema alone makes a grade of what they say, once their reason has an end."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    request = judge_client._request

    def with_a_short_reason(case: Case, params: JudgeParams) -> dict[str, Any]:
        asked = request(case, params)
        asked["response_format"]["json_schema"]["schema"]["properties"]["reason"]["maxLength"] = 20
        return asked

    monkeypatch.setattr(judge_client, "_request", with_a_short_reason)
    meter, judge = Meter(SilentProgress(), total=4), Judge(JudgeParams(model="grader"), endpoint, "sk-judge")
    require_answering(judge, meter)
    items, measured = measured_answers(questions(), sft=["It is Ketu."] * 4)
    judged = judge_items(judge, items, questions(), measured, meter)
    assert metrics(judged)["judge.judged"] == 1.0
    grades = {1 + 4 * told.score for item in judged if (told := item.models["sft"].judgement) is not None and told.score is not None}
    assert grades <= {1.0, 2.0, 3.0, 4.0, 5.0}


def test_what_a_real_vllm_says_to_a_wrong_key_and_a_wrong_name(endpoint: JudgeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    meter = Meter(SilentProgress(), total=1)
    with pytest.raises(InvalidRequest, match="it refuses the key in PARAMPARA_EVALUATOR__JUDGE_API_KEY"):
        require_answering(Judge(JudgeParams(model="grader"), endpoint, "sk-other"), meter)
    with pytest.raises(InvalidRequest, match=r"404: .*stranger"):
        require_answering(Judge(JudgeParams(model="stranger"), endpoint, "sk-judge"), meter)
