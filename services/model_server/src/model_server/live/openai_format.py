"""Whether an endpoint answers in OpenAI's format: the parts of the shapes that the SDK's own types require.

Source: the types of openai-python (``openai.types.chat.ChatCompletion``, ``ChatCompletionChunk``, ``openai.types.Model``), whose strict
validation fails on a missing key or an unknown ``finish_reason``. More keys are allowed, as there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Finish = Literal["stop", "length", "tool_calls", "content_filter", "function_call"]
Count = Annotated[int, Field(ge=0)]
END_OF_STREAM = "[DONE]"


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Usage(_Shape):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class Message(_Shape):
    role: Literal["assistant"]
    content: str | None


class Choice(_Shape):
    index: Count
    message: Message
    finish_reason: Finish


class ChatCompletion(_Shape):
    id: Annotated[str, Field(min_length=1)]
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: Usage


class Delta(_Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Shape):
    index: Count
    delta: Delta
    finish_reason: Finish | None = None


class Chunk(_Shape):
    id: Annotated[str, Field(min_length=1)]
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class Model(_Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(_Shape):
    object: Literal["list"]
    data: list[Model]


class ErrorDetail(_Shape):
    message: str
    type: str
    param: str | None
    code: str | int | None
    """OpenAI's is a string; vLLM gives the HTTP status, which the SDK accepts and the gateway turns into a string."""


class Error(_Shape):
    error: ErrorDetail


def chat_faults(answer: Any, *, model: str) -> list[str]:
    """What is wrong with one plain chat completion; empty when nothing is."""
    shape, faults = _read(ChatCompletion, answer)
    if shape is None:
        return faults
    if shape.usage.total_tokens != shape.usage.prompt_tokens + shape.usage.completion_tokens:
        faults.append("usage.total_tokens is not the sum of the others")
    return faults + _name_faults(shape.model, model)


def stream_faults(events: Sequence[str], *, model: str) -> list[str]:
    """What is wrong with the ``data:`` fields of one streamed chat completion that was asked for its usage."""
    if not events or events[-1] != END_OF_STREAM:
        return [f"the stream does not end with {END_OF_STREAM}"]
    chunks: list[Chunk] = []
    for number, event in enumerate(events[:-1]):
        shape, faults = _read(Chunk, event)
        if shape is None:
            return [f"chunk {number}: {fault}" for fault in faults]
        chunks.append(shape)
    choices = [choice for chunk in chunks for choice in chunk.choices]
    faults = _name_faults(chunks[0].model, model) if chunks else ["the stream has no chunk"]
    if len({chunk.id for chunk in chunks}) > 1:
        faults.append("its chunks have different ids")
    if not any(choice.delta.role for choice in choices[:1]):
        faults.append("its first chunk names no role")
    if [choice.finish_reason for choice in choices if choice.finish_reason] != [choices[-1].finish_reason if choices else None]:
        faults.append("it does not finish once, with its last choice")
    if chunks and (chunks[-1].usage is None or chunks[-1].choices):
        faults.append("its last chunk is not the usage that was asked for")
    return faults


def models_faults(answer: Any, *, model: str) -> list[str]:
    """What is wrong with ``GET /v1/models``."""
    shape, faults = _read(Models, answer)
    if shape is not None and model not in [item.id for item in shape.data]:
        faults.append(f"does not name {model!r}")
    return faults


def error_faults(status: int, answer: Any) -> list[str]:
    """What is wrong with the answer to a request for a model that is not there."""
    faults = _read(Error, answer)[1]
    return faults if status == 404 else [f"has status {status} and not 404", *faults]


def _name_faults(told: str, model: str) -> list[str]:
    return [] if told == model else [f"is of model {told!r} and not {model!r}"]


def _read(shape: type[Any], answer: Any) -> tuple[Any, list[str]]:
    try:
        return shape.model_validate(json.loads(answer) if isinstance(answer, str) else answer), []
    except ValidationError as error:
        return None, [f"{'.'.join(map(str, fault['loc'])) or 'answer'}: {fault['msg']}" for fault in error.errors(include_url=False)]
    except ValueError:
        return None, ["is no JSON"]
