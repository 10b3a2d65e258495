"""Ask through the gateway with the official ``openai`` SDK and collect answer, citations and timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import openai
from pydantic import BaseModel

from parampara.errors import UpstreamFailed
from standalone.client import Platform

TIMEOUT_SECONDS = 180.0


class Question(BaseModel):
    """What is asked, how, and (where known) what the computed facts say."""

    text: str
    language: str = "english"
    streamed: bool = False
    expected: str | None = None


class Citation(BaseModel):
    """One passage that the model saw; ``cited`` says whether the answer leans on it, and who said so."""

    marker: str
    title: str
    text: str
    cited: bool = True
    attributed_by: str | None = None
    """``model`` (it wrote the marker) or ``gateway`` (matched by its words)."""


class Answer(BaseModel):
    """What came back."""

    question: Question
    text: str
    model: str
    citations: list[Citation]
    seconds: float
    first_token_seconds: float
    matches: bool | None = None
    """Whether the answer line equals the computed fact; None where none is known."""


def openai_client(platform: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=platform.base_url, api_key=platform.api_key, timeout=TIMEOUT_SECONDS, max_retries=2)


def ask_model(
    platform: Platform, question: Question, *, model: str, max_tokens: int = 96, on_text: Callable[[str], None] | None = None
) -> Answer:
    """One chat completion.

    Raises:
        UpstreamFailed: the gateway refused, or nothing came back.
    """
    began = time.monotonic()
    with openai_client(platform) as client:
        request = client.chat.completions.create
        arguments: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        try:
            if question.streamed:
                text, served, message, first = _streamed(request(**arguments, stream=True), began, on_text or (lambda _: None))
            else:
                answer = request(**arguments)
                message = answer.choices[0].message.model_dump()
                text, served, first = message["content"] or "", answer.model, time.monotonic() - began
        except openai.OpenAIError as error:
            raise UpstreamFailed(f"{question.text!r} was not answered: {error}", code="not_answered") from None
    if not text.strip():
        raise UpstreamFailed(f"{question.text!r} got an empty answer from {served}.", code="not_answered")
    return Answer(
        question=question,
        text=text,
        model=served,
        citations=citations_of(message),
        seconds=round(time.monotonic() - began, 3),
        first_token_seconds=round(first, 3),
        matches=None if question.expected is None else answer_line(text) == normal(question.expected),
    )


def citations_of(message: dict[str, Any]) -> list[Citation]:
    """The rich form (``message.context.citations``) where the gateway gives it, else the standard annotations."""
    rich = (message.get("context") or {}).get("citations") or []
    if rich:
        return [
            Citation(
                marker=f"[{entry['index']}]",
                title=f"{entry['filename']}, page {entry['page']}" if entry.get("page") else entry["filename"],
                text=" ".join(entry["text"].split()),
                cited=entry["cited"],
                attributed_by=entry["attributed_by"],
            )
            for entry in rich
        ]
    plain = [entry["url_citation"] for entry in message.get("annotations") or []]
    return [Citation(marker=f"[{number}]", title=entry["title"], text="") for number, entry in enumerate(plain, 1)]


def answer_line(text: str) -> str:
    """The ``Answer:`` line of an answer, or all of it where there is none, normalised for comparison."""
    for line in text.splitlines():
        if line.strip().lower().startswith("answer:"):
            return normal(line.split(":", 1)[1])
    return normal(text)


def normal(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    kept = "".join(character if character.isalnum() or character in "°'\"" else " " for character in text.casefold())
    return " ".join(kept.split())


def _streamed(chunks: openai.Stream[Any], began: float, on_text: Callable[[str], None]) -> tuple[str, str, dict[str, Any], float]:
    parts: list[str] = []
    served, first = "", 0.0
    message: dict[str, Any] = {}
    for chunk in chunks:
        served = chunk.model or served
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            if delta.get("content"):
                first = first or time.monotonic() - began
                parts.append(delta["content"])
                on_text(delta["content"])
            for key in ("annotations", "context"):
                if delta.get(key):
                    message[key] = delta[key]
    return "".join(parts), served, message, first
