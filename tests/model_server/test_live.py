"""The live endpoint held against an evaluation, with answers that vLLM 0.32 gave: the right model, another one, and damaged ones.

``recorded/<server>.json`` are exchanges with a real server, ``recorded/expected_<model>.json`` what the evaluator measured on a model:
``base`` is examples/kp/base, ``tuned`` the same after a small change of every projection, ``int8`` the same in W8A8, ``damaged`` that with the
scale of one projection doubled and another name for the assistant in its template. Of ``prompt_logprobs`` the forced positions were kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_server.deploy import live_gates
from model_server.live import openai_format, replay, speed
from model_server.live.compare import Position, Sums, coarse_kl, common_prefix, compare, read_positions
from model_server.live.endpoint import Endpoint
from parampara.errors import InvalidData, Preempted, Unavailable, UpstreamFailed
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.expectations import Expectations, read_expectations
from parampara.schemas.stages import DeployConfig, DeployParams, Gate, LiveParams

RECORDED = Path(__file__).with_name("recorded")
BASE = Path(__file__).resolve().parents[2] / "examples" / "kp" / "base"
MODEL = "ft:base"
Exchange = dict[str, Any]


class Told(SilentProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def event(self, message: str, *, level: Any = "info", **data: Any) -> None:
        if level == "warn":
            self.warnings.append(message)


def expected(model: str) -> Expectations:
    return Expectations.model_validate_json((RECORDED / f"expected_{model}.json").read_bytes())


def exchanges(server: str) -> list[Exchange]:
    return json.loads((RECORDED / f"{server}.json").read_text(encoding="utf-8"))


def endpoint(recorded: list[Exchange]) -> Endpoint:
    """A server that answers what was recorded, and nothing else."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        for exchange in recorded:
            if exchange["path"] == request.url.path and asked(exchange["request"]) == asked(body):
                return httpx.Response(exchange["status"], text=exchange["text"])
        pytest.fail(f"not recorded: {request.url.path} {body}")

    return Endpoint(httpx.Client(transport=httpx.MockTransport(answer)), url="http://vllm", model=MODEL)


def asked(body: dict[str, Any] | None) -> dict[str, Any] | None:
    """A request as it was recorded; how long the stream for the speed may be depends on the room behind its prompt."""
    return {**body, "max_tokens": 128} if body and body.get("stream") and body.get("ignore_eos") else body


def measure(server: list[Exchange], model: str, *, path: Path = BASE, progress: Any = None) -> dict[str, float]:
    return replay.measure(endpoint(server), expected(model), model_path=path, progress=progress or SilentProgress())


def changed(recorded: list[Exchange], path: str, change: Callable[[dict[str, Any]], None], **request: Any) -> list[Exchange]:
    """The exchanges with ``change`` applied to the JSON answers of ``path`` whose request has these values."""
    for exchange in recorded:
        body = exchange["request"] or {}
        if exchange["path"] == path and not body.get("stream") and all(body.get(key) == value for key, value in request.items()):
            told = json.loads(exchange["text"])
            change(told)
            exchange["text"] = json.dumps(told)
    return recorded


def test_the_model_that_was_evaluated_passes_everything() -> None:
    told = Told()
    metrics = measure(exchanges("base"), "base", progress=told)
    exact = ("top1", "greedy_match", "greedy_prefix", "chat_template", "generation_config")
    assert [metrics[f"parity.live.{name}"] for name in exact] == [1.0] * 5
    assert metrics["parity.live.kl"] < 1e-4  # float32 in transformers, float16 in vLLM
    assert abs(metrics["parity.live.perplexity_change"]) < 1e-2
    assert metrics["serving.openai_format"] == 1.0
    assert metrics["serving.tokens_per_second"] > 0
    assert not told.warnings


def test_a_stale_endpoint_that_serves_the_base_under_the_name_is_caught() -> None:
    metrics = measure(exchanges("base"), "tuned")
    assert metrics["parity.live.top1"] < 0.97
    assert metrics["parity.live.kl"] > 0.05
    assert metrics["parity.live.greedy_match"] < 1
    assert metrics["parity.live.chat_template"] == 1.0


def test_a_wrong_scale_and_a_swapped_template_are_caught_by_different_figures() -> None:
    metrics = measure(exchanges("damaged"), "int8")
    assert metrics["parity.live.top1"] < 0.97
    assert metrics["parity.live.kl"] > 0.02
    assert metrics["parity.live.chat_template"] == 0.0
    assert metrics["parity.live.generation_config"] == 1.0


def test_a_prompt_that_the_server_renders_otherwise_is_caught() -> None:
    def other(told: dict[str, Any]) -> None:
        told["tokens"] = [*told["tokens"], 7]

    one = expected("base").probes[0].messages[0].content
    message = [{"role": "user", "content": one}]
    metrics = measure(changed(exchanges("base"), "/tokenize", other, messages=message), "base")
    assert metrics["parity.live.chat_template"] == 0.5  # one of two probes
    assert metrics["parity.live.top1"] == 1.0


def test_other_default_sampling_is_caught(tmp_path: Path) -> None:
    def other(told: dict[str, Any]) -> None:
        told["choices"][0]["token_ids"][-1] += 1

    drawn = changed(exchanges("base"), "/v1/completions", other, n=4, temperature=1.0)
    assert measure(drawn, "base")["parity.live.generation_config"] == 0.0
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.2, "transformers_version": "9"}')
    assert measure(exchanges("base"), "base", path=tmp_path)["parity.live.generation_config"] == 0.0


def test_what_the_server_refuses_is_told_and_left_out_of_the_metrics() -> None:
    recorded = exchanges("base")
    for exchange in recorded:
        if (exchange["request"] or {}).get("prompt_logprobs"):
            exchange.update(status=400, text='{"error": {"message": "max logprobs allowed: 5"}}')
    told = Told()
    metrics = measure(recorded, "base", progress=told)
    assert not [name for name in metrics if name.startswith("parity.live.top1")]
    assert metrics["serving.openai_format"] == 1.0
    assert [line for line in told.warnings if "max logprobs allowed: 5" in line]


def test_a_server_with_too_little_room_for_any_probe_is_told() -> None:
    def small(answer: dict[str, Any]) -> None:
        answer["max_model_len"] = 30

    told = Told()
    metrics = measure(changed(exchanges("base"), "/tokenize", small, prompt="a"), "base", progress=told)
    assert "parity.live.top1" not in metrics
    assert "none of 2 probes fits the server's max_model_len of 30 tokens" in told.warnings[0]


def test_a_server_that_goes_away_is_no_missed_gate() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    away = Endpoint(httpx.Client(transport=httpx.MockTransport(gone)), url="http://vllm", model=MODEL)
    with pytest.raises(Unavailable, match="stopped answering while the live endpoint was measured"):
        replay.measure(away, expected("base"), model_path=BASE, progress=SilentProgress())


def test_a_wish_to_stop_is_heard_between_requests() -> None:
    stop.request()
    try:
        with pytest.raises(Preempted):
            measure(exchanges("base"), "base")
    finally:
        stop.clear()


# ------------------------------------------------------------------------------------------------------------ arithmetic


def logs(**probabilities: float) -> dict[int, float]:
    return {ord(name): math.log(p) for name, p in probabilities.items()}


def test_kl_over_a_whole_vocabulary_is_the_exact_one() -> None:
    p, q = logs(a=0.5, b=0.25, c=0.25), logs(a=0.25, b=0.5, c=0.25)
    assert coarse_kl(p, q, floor=math.log(0.25)) == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5), abs=1e-6)
    assert coarse_kl(p, p, floor=math.log(0.25)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_kl_of_the_likeliest_tokens_is_never_above_the_true_one(seed: int) -> None:
    import random

    draw = random.Random(seed)
    weights = [[draw.expovariate(1) ** 4 + 1e-12 for _ in range(50)] for _ in range(2)]
    p, q = ({token: math.log(weight / sum(row)) for token, weight in enumerate(row)} for row in weights)
    true = sum(math.exp(p[token]) * (p[token] - q[token]) for token in p)

    def top(told: Mapping[int, float]) -> dict[int, float]:
        return dict(sorted(told.items(), key=lambda item: -item[1])[:8])

    bound = coarse_kl(top(p), top(q), floor=min(top(q).values()))
    assert 0 <= bound <= true + 1e-9
    assert bound > 0.1 * true  # and it says something


def test_two_models_without_a_common_likely_token_are_far_apart() -> None:
    p, q = logs(a=0.9, b=0.05), logs(c=0.9, d=0.01)
    assert coarse_kl(p, q, floor=math.log(0.01)) > 2


def test_sums_add_up_and_are_divided_once() -> None:
    probe = expected("base").probes[0]
    exact = [
        Position(dict(zip(ids, told, strict=True)) | {forced: logprob}, ids[0])
        for ids, told, forced, logprob in zip(probe.top_ids, probe.top_logprobs, probe.forced_ids, probe.forced_logprobs, strict=True)
    ]
    other = [Position(position.logprobs, -1) for position in exact]
    total = compare(probe, exact) + compare(probe, other)
    assert total.tokens == 2 * len(probe.forced_ids)
    assert total.metrics() == pytest.approx({"kl": 0.0, "top1": 0.5, "perplexity_change": 0.0}, abs=1e-6)
    assert Sums(live_nats=2.0, expected_nats=1.0, tokens=2).metrics()["perplexity_change"] == pytest.approx(math.exp(0.5) - 1)


@pytest.mark.parametrize("entries", [[], [None, None], [None, {"x": {}}], [None, {"5": {"logprob": None, "rank": 1}}]])
def test_logprobs_of_another_shape_are_refused_by_name(entries: list[Any]) -> None:
    with pytest.raises(UpstreamFailed, match="prompt_logprobs"):
        read_positions(entries, count=1)


@pytest.mark.parametrize(
    ("first", "second", "share"), [([], [], 1.0), ([], [1], 0.0), ([1, 2], [1, 2, 3], 1.0), ([1, 2, 3, 4], [1, 2, 9], 0.5)]
)
def test_common_prefix(first: list[int], second: list[int], share: float) -> None:
    assert common_prefix(first, second) == share


def test_pace_counts_what_came_after_the_first_token() -> None:
    one = speed.Pace(asked=0.0, arrivals=[(1.0, 3), (1.5, 5), (2.0, 5)])
    late = speed.Pace(asked=0.0, arrivals=[(2.0, 1), (3.0, 10)])
    assert speed.rate([one]) == 10.0
    assert speed.rate([one, late]) == 10.0


# ---------------------------------------------------------------------------------------------------------------- format


def recorded_chat(*, stream: bool) -> str:
    return next(
        item["text"]
        for item in exchanges("base")
        if (item["request"] or {}).get("max_tokens") == 8 and bool(item["request"].get("stream")) == stream and item["status"] == 200
    )


def events() -> list[str]:
    return [line.removeprefix("data: ") for line in recorded_chat(stream=True).splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda told: told.pop("id"), "id: Field required"),
        (lambda told: told.update(object="chat"), "object"),
        (lambda told: told.update(created="now"), "created"),
        (lambda told: told["choices"][0].update(finish_reason="done"), "finish_reason"),
        (lambda told: told["choices"][0]["message"].update(role="bot"), "role"),
        (lambda told: told["usage"].update(total_tokens=1), "usage.total_tokens is not the sum"),
        (lambda told: told.update(model="other"), "is of model 'other'"),
    ],
)
def test_a_chat_completion_in_another_shape_is_told(damage: Callable[[dict[str, Any]], Any], fault: str) -> None:
    told = json.loads(recorded_chat(stream=False))
    assert openai_format.chat_faults(told, model=MODEL) == []
    damage(told)
    assert fault in " ".join(openai_format.chat_faults(told, model=MODEL))


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda told: told.pop(), "does not end with [DONE]"),
        (lambda told: told.pop(-2), "its last chunk is not the usage"),
        (lambda told: told.pop(0), "names no role"),
        (lambda told: told.pop(-3), "does not finish once"),
        (lambda told: told.insert(1, "{"), "chunk 1: is no JSON"),
        (lambda told: told.insert(1, told[1].replace("chatcmpl", "x")), "different ids"),
    ],
)
def test_a_stream_in_another_shape_is_told(damage: Callable[[list[str]], Any], fault: str) -> None:
    told = events()
    assert openai_format.stream_faults(told, model=MODEL) == []
    damage(told)
    assert fault in " ".join(openai_format.stream_faults(told, model=MODEL))


def test_an_unknown_model_has_to_be_a_404_in_openais_shape() -> None:
    error = '{"error": {"message": "no", "type": "NotFoundError", "param": "model", "code": 404}}'
    assert openai_format.error_faults(404, error) == []
    assert openai_format.error_faults(200, "{}") == ["has status 200 and not 404", "error: Field required"]
    assert openai_format.models_faults('{"object": "list", "data": []}', model=MODEL) == [f"does not name {MODEL!r}"]


# ---------------------------------------------------------------------------------------------------------------- bounds


def test_a_gate_of_the_recipe_takes_the_place_of_the_bound_on_its_metric(tmp_path: Path) -> None:
    own = Gate(metric="parity.live.top1", min=0.5, action="fail")
    told: dict[str, Any] = {"artifact_id": "sha256:a", "model_path": tmp_path, "model_name": "m", "alias": "kp", "generation": 1}
    config = DeployConfig(**told, model_server_url="http://x", gates=[own], params=DeployParams())
    assert [(gate.metric, gate.min, gate.action) for gate in live_gates(config)] == [
        ("parity.live.top1", 0.5, "fail"),
        ("parity.live.chat_template", 1.0, "hold"),
    ]
    unbound = DeployParams(live=LiveParams(min_top1=None, same_prompts=False))
    assert live_gates(config.model_copy(update={"gates": [], "params": unbound})) == []


# ------------------------------------------------------------------------------------------------------------------ file


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "the file: Invalid JSON"),
        ('{"model": "quantized"}', "generation_config: Field required"),
        ((RECORDED / "expected_base.json").read_text().replace('"forced_ids":[', '"forced_ids":[1,'), "probes.0"),
    ],
)
def test_expectations_that_are_not_whole_are_refused_by_place(tmp_path: Path, text: str, fault: str) -> None:
    assert read_expectations(tmp_path) is None
    (tmp_path / "expectations.json").write_text(text)
    with pytest.raises(InvalidData) as caught:
        read_expectations(tmp_path)
    assert fault in caught.value.message
