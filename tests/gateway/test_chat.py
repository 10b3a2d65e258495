"""The token path against a scripted model server: what goes up, what comes back, and what happens when things break."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from parampara.db.models import Alias, Model, Run
from tests.gateway.conftest import MODEL, Running

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Who rules Ashwini?"}]


def test_a_plain_answer_with_the_sdk(gateway: Running) -> None:
    answer = gateway.sdk.chat.completions.create(model="kp", messages=MESSAGES, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == "Answer: Ketu"
    assert answer.model == MODEL
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10
    sent = gateway.script.last
    assert (sent["model"], sent["max_tokens"], sent["messages"]) == (MODEL, 20, MESSAGES)


def test_a_streamed_answer_with_the_sdk(gateway: Running) -> None:
    gateway.script.text = "Answer: Ketu\nRule: lord of the star"
    stream = gateway.sdk.chat.completions.create(model="kp", messages=MESSAGES, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == gateway.script.text
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {MODEL}


def test_usage_is_streamed_only_to_who_asked_for_it(gateway: Running) -> None:
    before = _prompt_tokens(gateway)

    def chunks(include: bool) -> list[Any]:
        options: Any = {"include_usage": include}
        return list(gateway.sdk.chat.completions.create(model="kp", messages=MESSAGES, stream=True, stream_options=options))

    with_usage, without = chunks(True), chunks(False)
    assert with_usage[-1].usage.total_tokens == 10
    assert with_usage[-1].choices == []
    assert all(chunk.choices and chunk.usage is None for chunk in without)
    assert _prompt_tokens(gateway) - before == 14


def test_raw_completions_with_the_sdk(gateway: Running) -> None:
    answer = gateway.sdk.completions.create(model=MODEL, prompt="Ashwini is ruled by", max_tokens=4)
    assert (answer.choices[0].text, answer.model) == ("Answer: Ketu", MODEL)
    # not strict: the SDK's type has no null finish_reason, which OpenAI's own streams of raw completions carry
    sdk = gateway.sdk.with_options()
    sdk._strict_response_validation = False
    chunks = list(sdk.completions.create(model="kp", prompt=["a"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Answer: Ketu"


def test_a_model_is_asked_under_the_system_prompt_it_was_trained_with(gateway: Running) -> None:
    recipe = {"stages": {"sft": {"system_prompt": "You are an expert in KP."}}}
    with gateway.sessions.begin() as session:
        session.add(Run(id="run_1", name="kp", recipe=recipe, datasets={}))
        session.flush()
        session.get_one(Model, MODEL).run_id = "run_1"
    time.sleep(0.6)
    question = {"role": "user", "content": "Who rules Ashwini?"}
    trained = {"role": "system", "content": "You are an expert in KP."}
    for name in ("kp", MODEL):
        assert gateway.ask(model=name).status_code == 200
        assert gateway.script.last["messages"] == [trained, question]
    own = {"role": "system", "content": "Be brief."}
    assert gateway.ask(messages=[own, question]).status_code == 200
    assert gateway.script.last["messages"] == [own, question]


def test_the_prefix_cache_is_salted_by_key_and_the_user_field_stays_here(gateway: Running) -> None:
    gateway.ask(user="someone", metadata={"a": "b"}, store=False, service_tier="auto", top_k=5)
    sent = gateway.script.last
    assert set(sent) == {"model", "messages", "cache_salt", "top_k"}
    assert gateway.key not in json.dumps(sent)


def test_roles_and_content_parts_are_brought_into_the_template_s_form(gateway: Running) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "context": {"citations": []}},
    ]
    assert gateway.ask(messages=messages).status_code == 200
    assert gateway.script.last["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": ""},
    ]


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n": 5}, "n"),
    ({"n": True}, "n"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"50256": -100}}, "logit_bias"),
    ({"min_tokens": 10}, "min_tokens"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"chat_template": "{% for x in y %}"}, "chat_template"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"guided_json": {}}, "guided_json"),
    ({"cache_salt": "mine"}, "cache_salt"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": "yes"}, "stream"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [{"role": "user", "content": "x"}] * 65}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "x", "secret": 1}]}, "messages[0].secret"),
    ({"tools": [{"type": "code_interpreter"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"model": None}, "model"),
    ({"model": 7}, "model"),
]


def test_a_bad_field_is_a_400_that_names_it(gateway: Running) -> None:
    answers = {}
    for change, param in BAD_FIELDS:
        response = gateway.ask(**change)
        if (response.status_code, response.json()["error"]["param"]) != (400, param):
            answers[str(change)] = response.text
    assert answers == {}
    assert gateway.script.requests == []


def test_a_bad_value_is_shown_with_its_limits_in_full(gateway: Running) -> None:
    search = {"type": "file_search", "vector_store_ids": ["vs_1"]}
    for change, words in (
        ({"max_tokens": 2_000_000}, "from 1 to 1,048,576 (got 2000000)"),
        ({"stop": 7}, "(got 7)"),
        ({"tools": [{**search, "max_num_results": 99}]}, "from 1 to 50 (got 99)"),
        ({"tools": [{**search, "ranking_options": {"score_threshold": "high"}}]}, "(got 'high')"),
    ):
        assert words in gateway.ask(**change).json()["error"]["message"]


def test_bodies_that_are_no_chat_request(start_gateway: Callable[..., Running]) -> None:
    gateway = start_gateway(max_body_bytes=2000)
    for content, status in [
        (b"{", 400),
        (b"[1]", 400),
        (b"", 400),
        (b'{"model": NaN}', 400),
        (b'{"model": "\xff"}', 400),
        (b"[" * 1500, 400),
        (b'{"a":"' + b"x" * 2000 + b'"}', 413),
    ]:
        response = gateway.http.post("/v1/chat/completions", content=content)
        assert response.status_code == status, content
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    chunked = gateway.http.post("/v1/chat/completions", content=iter([b"x" * 1000] * 5))
    assert chunked.status_code == 413


def test_unknown_models_and_wrong_methods(gateway: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        gateway.sdk.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    response = gateway.http.get("/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["code"], response.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert gateway.http.post("/v1/nothing").json()["error"]["code"] == "unknown_url"


def test_a_model_server_that_is_away_is_a_503_with_retry_after(gateway: Running) -> None:
    _point_alias_at(gateway, "http://127.0.0.1:9")
    response = gateway.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_unavailable")
    assert int(response.headers["retry-after"]) >= 1


def test_a_model_that_is_being_switched_is_a_503_not_a_404(gateway: Running) -> None:
    gateway.script.model = "ft:another"
    response = gateway.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_starting")


REFUSALS: list[tuple[int, dict[str, Any], int, str]] = [
    (400, {"error": {"message": "too large: maximum context length", "param": "max_tokens", "code": 400}}, 400, "context_length_exceeded"),
    (400, {"error": {"message": "bad", "code": 400}}, 400, "invalid_value"),
    (429, {}, 429, "rate_limit_exceeded"),
    (500, {"error": {"message": "secret trace", "code": 500}}, 502, "upstream_error"),
    (503, {}, 503, "model_unavailable"),
    (401, {"detail": "no"}, 502, "upstream_error"),
]


def test_what_the_model_server_refuses(gateway: Running) -> None:
    for status, error, expected, code in REFUSALS:
        gateway.script.status, gateway.script.error = status, error
        for stream in (False, True):
            response = gateway.ask(stream=stream)
            assert (response.status_code, response.json()["error"]["code"]) == (expected, code)
            assert "secret" not in response.text
            assert ("retry-after" in response.headers) == (expected in (429, 503))


def test_a_model_server_that_hangs_is_a_504_that_the_sdk_does_not_repeat(start_gateway: Callable[..., Running]) -> None:
    gateway = start_gateway(total_seconds=0.5, first_token_seconds=0.5, inter_token_seconds=0.5)
    gateway.script.delay = 20
    for stream in (False, True):
        response = gateway.ask(stream=stream)
        if stream and response.status_code == 200:  # its headers came in time, its first token did not
            assert "upstream_timeout" in response.text
            continue
        assert (response.status_code, response.json()["error"]["code"]) == (504, "upstream_timeout")
        assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("fault", ["break_after", "fail_after"])
def test_a_stream_that_breaks_ends_with_an_error_event(gateway: Running, fault: str) -> None:
    gateway.script.text = "Answer: Ketu and more of it"
    setattr(gateway.script, fault, 2)
    parts: list[str] = []
    stream = gateway.sdk.chat.completions.create(model="kp", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as broken:
        parts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "".join(parts) == "Answer: "
    assert broken.value.code == "upstream_error"


def test_silence_in_a_stream_is_bridged_by_pings(gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.sse.PING_SECONDS", 0.1)
    gateway.script.delay = 0.5
    response = gateway.ask(stream=True)
    assert response.text.count(": ping\n\n") >= 3
    assert response.text.endswith("data: [DONE]\n\n")
    chunks = list(gateway.sdk.chat.completions.create(model="kp", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Answer: Ketu"


def test_a_stream_over_the_total_time_ends_with_an_error_and_not_with_pings(start_gateway: Callable[..., Running]) -> None:
    """When the whole exchange's time is over every read fails at once: no silence, and a ping for each would never end."""
    gateway = start_gateway(total_seconds=1, inter_token_seconds=5)
    gateway.script.delay, gateway.script.text = 0.3, "word " * 100
    text = gateway.ask(stream=True).text
    assert text.count(": ping") < 5
    assert "PARAMPARA_GATEWAY__TOTAL_SECONDS" in text
    assert json.loads(text.rstrip().rsplit("data: ", 1)[1])["error"]["code"] == "upstream_timeout"


def test_request_ids_are_kept_or_made(gateway: Running) -> None:
    own = gateway.http.post("/v1/chat/completions", json={}, headers={"x-request-id": "mine-1"})
    assert own.headers.get_list("x-request-id") == ["mine-1"]
    forged = gateway.http.get("/v1/models", headers={"x-request-id": "a b"})
    [made] = forged.headers.get_list("x-request-id")
    assert made.startswith("req_")


def test_functions_go_through_and_forced_ones_need_the_operator(gateway: Running) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert gateway.ask(tools=[tool]).status_code == 200
    assert (gateway.script.last["tools"], gateway.script.last["tool_choice"]) == ([tool], "auto")
    refused = gateway.ask(tools=[tool], tool_choice="required")
    assert refused.json()["error"]["param"] == "tool_choice"
    gateway.settings.gateway.structured_outputs = True
    assert gateway.ask(tools=[tool], tool_choice="required", response_format={"type": "json_object"}).status_code == 200
    assert gateway.script.last["response_format"] == {"type": "json_object"}


def _prompt_tokens(gateway: Running) -> float:
    lines = gateway.http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith('parampara_gateway_tokens_total{direction="prompt"'))


def _point_alias_at(gateway: Running, url: str) -> None:
    with gateway.sessions.begin() as session:
        session.get_one(Alias, "kp").url = url
    time.sleep(0.6)


def test_headers_too_large(gateway: Running) -> None:
    response = gateway.http.get("/v1/models", headers={"x-filler": "a" * 70_000})
    assert (response.status_code, response.json()["error"]["code"]) == (431, "headers_too_large")
