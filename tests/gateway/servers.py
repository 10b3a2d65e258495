"""Real servers for the gateway's tests: uvicorn in a thread, each on a free port.

The model server is scripted: it speaks OpenAI's protocol as vLLM does, notes every request and every connection that is
closed before its answer was complete, and can be told to be slow, to fail or to break off. (The tests with the real vLLM
are marked slow.) Embedder, database and control plane are the real ones.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from aiohttp import web

from parampara.settings import Settings
from tests.conftest import free_port

EMBEDDING_MODEL = "all-minilm-l6-v2"


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Base URL of an ASGI application that runs as it does in production, in a thread."""
    port = free_port()
    config = uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    _wait(lambda: server.started or not thread.is_alive())
    assert server.started, "the server did not start"
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(15)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="session")
def embedder_url() -> Iterator[str]:
    """The real embedder with its real model."""
    from embedder.app import create_app

    with served(create_app(Settings())) as url:
        yield url


@dataclass
class ScriptedModel:
    """What the scripted model server says and what it has seen."""

    model: str
    url: str = ""
    text: str = "Answer: Ketu"
    window: int | None = 1024
    delay: float = 0.0
    """Before the answer starts, and between streamed pieces."""
    status: int = 200
    error: dict[str, Any] | None = None
    break_after: int | None = None
    """Break a stream off after this many pieces."""
    fail_after: int | None = None
    """Send an error event after this many pieces."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    cancelled: list[float] = field(default_factory=list)
    """``time.monotonic()`` of each connection that closed before its answer was complete."""

    @property
    def last(self) -> dict[str, Any]:
        return self.requests[-1]

    def tokens(self, text: str) -> int:
        return -(-len(text) // 3)


@contextmanager
def scripted_model(model: str) -> Iterator[ScriptedModel]:
    script = ScriptedModel(model)
    app = web.Application(client_max_size=2**26)
    app.router.add_get("/health", _ok)
    app.router.add_get("/v1/models", lambda request: _models(script))
    app.router.add_post("/tokenize", lambda request: _tokenize(script, request))
    app.router.add_post("/v1/chat/completions", lambda request: _complete(script, request, chat=True))
    app.router.add_post("/v1/completions", lambda request: _complete(script, request, chat=False))
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        script.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        return runner

    def work() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield script
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


async def _ok(request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _models(script: ScriptedModel) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": script.model, "object": "model", "max_model_len": script.window}]})


async def _tokenize(script: ScriptedModel, request: web.Request) -> web.Response:
    body = await request.json()
    count = sum(4 + script.tokens(message["content"]) for message in body["messages"])
    return web.json_response({"count": count, "max_model_len": script.window, "tokens": [0] * count})


async def _complete(script: ScriptedModel, request: web.Request, *, chat: bool) -> web.StreamResponse:
    body = await request.json()
    script.requests.append(body)
    if body["model"] != script.model:
        error = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}
        return web.json_response({"error": error}, status=404)
    try:
        if script.delay and not body.get("stream"):
            await asyncio.sleep(script.delay)
        if script.status != 200:
            return web.json_response(script.error or {"error": {"message": "no"}}, status=script.status)
        return await (_stream(script, request, body, chat) if body.get("stream") else _whole(script, body, chat))
    except (asyncio.CancelledError, ConnectionError):
        script.cancelled.append(time.monotonic())
        raise


async def _whole(script: ScriptedModel, body: dict[str, Any], chat: bool) -> web.Response:
    message = {"role": "assistant", "content": script.text, "refusal": None, "annotations": None, "tool_calls": [], "reasoning": None}
    choices = [
        {"index": index, "finish_reason": "stop", "logprobs": None, **({"message": dict(message)} if chat else {"text": script.text})}
        for index in range(body.get("n", 1))
    ]
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    head = _head(script, "chat.completion" if chat else "text_completion")
    return web.json_response({**head, "choices": choices, "usage": usage, "prompt_logprobs": None, "kv_transfer_params": None})


async def _stream(script: ScriptedModel, request: web.Request, body: dict[str, Any], chat: bool) -> web.StreamResponse:
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    head = _head(script, "chat.completion.chunk" if chat else "text_completion")

    async def send(data: Any) -> None:
        await response.write(b"data: " + (data if isinstance(data, bytes) else json.dumps(data, separators=(",", ":")).encode()) + b"\n\n")

    def choice(text: str, reason: str | None = None, **delta: Any) -> dict[str, Any]:
        said = {"delta": {**delta, "content": text}} if chat else {"text": text}
        return {**head, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": reason}]}

    if chat:
        await send(choice("", role="assistant"))
    pieces = [script.text[start : start + 4] for start in range(0, len(script.text), 4)]
    for number, piece in enumerate(pieces):
        if script.break_after == number:
            request.transport.abort()  # type: ignore[union-attr]
            return response
        if script.fail_after == number:
            await send({"error": {"message": "engine died", "type": "InternalServerError", "code": 500}})
            await send(b"[DONE]")
            return response
        await asyncio.sleep(script.delay)
        await send(choice(piece, "stop" if number == len(pieces) - 1 else None))
    if (body.get("stream_options") or {}).get("include_usage"):
        await send(
            {**head, "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 7 + len(pieces)}}
        )
    await send(b"[DONE]")
    return response


def _head(script: ScriptedModel, kind: str) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 1_750_000_000, "model": script.model}


def _wait(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


wait_until = _wait
