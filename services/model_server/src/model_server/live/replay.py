"""The expectations of an evaluation, replayed against the live endpoint: metrics ``parity.live.*`` and ``serving.*``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from model_server.live import openai_format, speed
from model_server.live.compare import Sums, common_prefix, compare, read_positions
from model_server.live.endpoint import Endpoint
from parampara.errors import UpstreamFailed
from parampara.progress import Progress
from parampara.schemas.expectations import TOP_K, Expectations, ExpectedProbe, generation_config

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What vLLM samples with where neither request nor ``generation_config.json`` says anything (its ``_DEFAULT_SAMPLING_PARAMS``)."""
_DRAWS = {"n": 4, "max_tokens": 16, "seed": 0, "ignore_eos": True, "return_token_ids": True}
"""Four answers of 16 tokens, which the seed makes the same ones every time that they are computed in the same batches."""
_TRIES = 5


def measure(endpoint: Endpoint, expected: Expectations, *, model_path: Path, progress: Progress) -> dict[str, float]:
    """Every metric that could be measured; what vLLM refused is told as an event and left out, so that a gate on it is missed.

    Raises:
        Unavailable: vLLM stopped answering.
        Preempted: the worker was asked to stop.
        InvalidData: ``model_path`` holds an unreadable generation_config.json.
    """
    shortest = expected.probes[-1]
    parts: list[tuple[str, Callable[[], dict[str, float]]]] = [
        ("probes", lambda: _probes(endpoint, expected, progress)),
        ("default sampling", lambda: _default_sampling(endpoint, expected, model_path)),
        ("OpenAI format", lambda: _format(endpoint, shortest, progress)),
        ("speed", lambda: _speed(endpoint, shortest)),
    ]
    metrics: dict[str, float] = {}
    for name, part in parts:
        progress.phase(f"live endpoint: {name}")
        try:
            metrics |= part()
        except UpstreamFailed as error:
            progress.event(f"live endpoint: {name} could not be measured: {error.message}", level="warn")
    return metrics


def _probes(endpoint: Endpoint, expected: Expectations, progress: Progress) -> dict[str, float]:
    limit = _max_tokens(endpoint)
    probes = [
        probe for probe in expected.probes if len(probe.prompt_ids) + max(len(probe.forced_ids) + 1, expected.max_new_tokens) <= limit
    ]
    if not probes:
        raise UpstreamFailed(f"none of {len(expected.probes)} probes fits the server's max_model_len of {limit} tokens.")
    rendered: list[bool] = []
    answers: list[list[int]] = []
    sums = Sums()
    for number, probe in enumerate(probes, 1):
        told = _greedy(endpoint, probe, expected)
        rendered.append(_renders(endpoint, probe, told["prompt_token_ids"]))
        answers.append(_answer(told, expected))
        sums += _forced(endpoint, probe)
        progress.step(number, len(probes))
    pairs = [(probe.greedy_ids, answer) for probe, answer in zip(probes, answers, strict=True)]
    told = {
        **sums.metrics(),
        "greedy_match": _mean([first == second for first, second in pairs]),
        "greedy_prefix": _mean([common_prefix(first, second) for first, second in pairs]),
        "chat_template": _mean(rendered),
    }
    return {f"parity.live.{name}": value for name, value in told.items()}


def _renders(endpoint: Endpoint, probe: ExpectedProbe, answered: Sequence[int]) -> bool:
    """Whether ``/tokenize`` and the chat that was answered both saw the tokens that training saw."""
    told = endpoint.ask("/tokenize", {"messages": _messages(probe), "add_generation_prompt": True})
    return told.get("tokens") == probe.prompt_ids and list(answered) == probe.prompt_ids


def _greedy(endpoint: Endpoint, probe: ExpectedProbe, expected: Expectations) -> dict[str, Any]:
    """``prompt_token_ids`` and ``token_ids`` of the greedy answer; penalties are off whatever the server's defaults are."""
    body = {**_NEUTRAL, "temperature": 0, "messages": _messages(probe), "max_tokens": expected.max_new_tokens, "return_token_ids": True}
    told = endpoint.ask(CHAT, body)
    try:
        return {"prompt_token_ids": told["prompt_token_ids"] or [], "token_ids": told["choices"][0]["token_ids"] or []}
    except (KeyError, IndexError, TypeError):
        raise UpstreamFailed("The chat completion tells no token ids although they were asked for (return_token_ids).") from None


def _answer(told: dict[str, Any], expected: Expectations) -> list[int]:
    """Without the token that ended it, as the evaluator keeps answers."""
    ids = told["token_ids"]
    return next((ids[:index] for index, token in enumerate(ids) if token in expected.stop_ids), ids)


def _forced(endpoint: Endpoint, probe: ExpectedProbe) -> Sums:
    body = {"prompt": probe.prompt_ids + probe.forced_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": TOP_K}
    choices = endpoint.ask(COMPLETIONS, body).get("choices") or [{}]
    return compare(probe, read_positions(choices[0].get("prompt_logprobs") or [], count=len(probe.forced_ids)))


def _default_sampling(endpoint: Endpoint, expected: Expectations, model_path: Path) -> dict[str, float]:
    """The served directory says about generation what the evaluated one said, and a request that says nothing is sampled so.

    No route of vLLM tells its defaults. Hence with one seed: what is written by default, and what is written when every parameter of the
    evaluated model's generation config is named, are the same tokens.
    """
    same_file = generation_config(model_path) == expected.generation_config
    named = {name: value for name in _NEUTRAL if (value := expected.generation_config.get(name)) is not None}
    start = expected.probes[0].prompt_ids[:1]  # nearly nothing to go on: the likeliest tokens are close, and the defaults decide
    draws = {**_DRAWS, "prompt": start}
    # which answers share a step of the engine is chance, and rounding with it: one equal pair is enough, and other defaults give none
    same_draws = any(_written(endpoint, draws) == _written(endpoint, {**_NEUTRAL, **named, **draws}) for _ in range(_TRIES))
    return {"parity.live.generation_config": float(same_file and same_draws)}


def _written(endpoint: Endpoint, body: dict[str, Any]) -> list[list[int]]:
    told = endpoint.ask(COMPLETIONS, body)
    try:
        return [choice["token_ids"] for choice in sorted(told["choices"], key=lambda choice: choice["index"])]
    except (KeyError, TypeError):
        raise UpstreamFailed("The completion tells no token ids although they were asked for (return_token_ids).") from None


def _format(endpoint: Endpoint, probe: ExpectedProbe, progress: Progress) -> dict[str, float]:
    """1 if a plain and a streamed chat, the list of models and the answer to an unknown model have OpenAI's shapes."""
    model, chat = endpoint.model, {"messages": _messages(probe), "max_tokens": 8, "temperature": 0}
    streamed = endpoint.stream(CHAT, {**chat, "stream_options": {"include_usage": True}})
    unknown = endpoint.post(CHAT, {**chat, "model": f"{model}:not-there"})
    faults = {
        "chat completion": openai_format.chat_faults(endpoint.post(CHAT, chat).text, model=model),
        "streamed chat completion": openai_format.stream_faults([event for _, event in streamed], model=model),
        "list of models": openai_format.models_faults(endpoint.get("/v1/models").text, model=model),
        "answer to an unknown model": openai_format.error_faults(unknown.status_code, unknown.text),
    }
    for name, found in faults.items():
        if found:
            progress.event(f"live endpoint: the {name} is not in OpenAI's format: {'; '.join(found[:5])}", level="warn")
    return {"serving.openai_format": float(not any(faults.values()))}


def _speed(endpoint: Endpoint, probe: ExpectedProbe) -> dict[str, float]:
    told = speed.measure(endpoint, _messages(probe), room=_max_tokens(endpoint) - len(probe.prompt_ids))
    return {f"serving.{name}": value for name, value in told.items()}


def _max_tokens(endpoint: Endpoint) -> int:
    limit = endpoint.ask("/tokenize", {"prompt": "a"}).get("max_model_len")
    if not isinstance(limit, int):
        raise UpstreamFailed("/tokenize does not tell max_model_len.")
    return limit


def _messages(probe: ExpectedProbe) -> list[dict[str, str]]:
    return [message.model_dump() for message in probe.messages]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
