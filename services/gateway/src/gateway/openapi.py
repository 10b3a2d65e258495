"""One documentation for the whole public base URL: the gateway's routes, the token path, and the control plane's schema."""

from __future__ import annotations

from typing import Any

import aiohttp
import orjson
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from gateway.passthrough import belongs_to_control_plane
from gateway.web import services
from parampara.http import install_docs

_TIMEOUT = aiohttp.ClientTimeout(total=3)
_DESCRIPTION = """
OpenAI-compatible API with retrieval and citations, and everything of the control plane, under one base URL.
Any OpenAI SDK works: `OpenAI(base_url="<this address>/v1", api_key="pp_...")`.

`model` is an alias or an immutable id; answers name the immutable id. Attach a vector store to an alias
(`POST /v1/aliases/{alias}`), or send the `file_search` tool, and answers cite the passages they were given:
`message.annotations`, and in full in `message.context.citations`. `tool_choice: "none"` answers without retrieval.
"""


def describe(app: FastAPI) -> None:
    """Add ``/docs`` and ``/openapi.json``."""

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> JSONResponse:
        schema = own_schema(app)
        theirs = await _control_plane_schema(request)
        for path, operations in theirs.get("paths", {}).items():
            if belongs_to_control_plane(path):
                schema["paths"].setdefault(path, operations)
        for kind, entries in theirs.get("components", {}).items():
            schema.setdefault("components", {}).setdefault(kind, {}).update(
                {name: entry for name, entry in entries.items() if name not in schema["components"][kind]}
            )
        return JSONResponse(schema)

    install_docs(app)


def own_schema(app: FastAPI) -> dict[str, Any]:
    """The gateway's own schema; it does not change while the process lives."""
    if app.openapi_schema is None:
        app.description = _DESCRIPTION
        schema = app.openapi()
        schema["paths"].update(_TOKEN_PATHS)
    return orjson.loads(orjson.dumps(app.openapi_schema))


async def _control_plane_schema(request: Request) -> dict[str, Any]:
    parts = services(request)
    try:
        async with parts.client.get(f"{parts.settings.gateway.control_plane_url}/openapi.json", timeout=_TIMEOUT) as response:
            return orjson.loads(await response.read()) if response.status == 200 else {}
    except (aiohttp.ClientError, TimeoutError, OSError, orjson.JSONDecodeError):
        return {}  # documentation without that part is better than none


def _operation(summary: str, properties: dict[str, Any], required: list[str], *, streams: bool) -> dict[str, Any]:
    body = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "post": {
            "tags": ["Models"],
            "summary": summary,
            "security": [{"API key": []}],
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": {"description": "As in OpenAI's API.", "content": content}},
        }
    }


def _sampling() -> dict[str, Any]:
    number, whole = {"type": "number"}, {"type": "integer"}
    return {
        "model": {"type": "string", "examples": ["kp"]},
        "max_tokens": {**whole, "minimum": 1},
        "temperature": {**number, "minimum": 0, "maximum": 2},
        "top_p": {**number, "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {**whole, "minimum": -1},
        "min_p": {**number, "minimum": 0, "maximum": 1},
        "presence_penalty": {**number, "minimum": -2, "maximum": 2},
        "frequency_penalty": {**number, "minimum": -2, "maximum": 2},
        "repetition_penalty": {**number, "exclusiveMinimum": 0, "maximum": 2},
        "seed": whole,
        "n": {**whole, "minimum": 1, "maximum": 4},
        "stop": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "maxItems": 4}]},
        "stream": {"type": "boolean"},
        "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
    }


_CHAT = {
    **_sampling(),
    "messages": {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
            "required": ["role", "content"],
        },
        "examples": [[{"role": "user", "content": "Which lord rules Ashwini?"}]],
    },
    "max_completion_tokens": {"type": "integer", "minimum": 1},
    "logprobs": {"type": "boolean"},
    "top_logprobs": {"type": "integer", "minimum": 0, "maximum": 20},
    "tools": {"type": "array", "items": {"type": "object"}, "description": "`file_search` (answered here) and functions."},
    "tool_choice": {"description": "`none` switches retrieval off."},
    "response_format": {"type": "object"},
}
_TOKEN_PATHS = {
    "/v1/chat/completions": _operation("Chat, with retrieval and citations", _CHAT, ["model", "messages"], streams=True),
    "/v1/completions": _operation(
        "Continue a raw prompt",
        {**_sampling(), "prompt": {"type": "string"}, "echo": {"type": "boolean"}, "logprobs": {"type": "integer"}},
        ["model", "prompt"],
        streams=True,
    ),
    "/v1/embeddings": _operation(
        "Embed texts",
        {
            "model": {"type": "string", "examples": ["all-minilm-l6-v2"]},
            "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]},
            "encoding_format": {"enum": ["float", "base64"]},
            "dimensions": {"type": "integer"},
        },
        ["model", "input"],
        streams=False,
    ),
}
