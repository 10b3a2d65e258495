"""One HTTP request and its answer on plain ASGI: body limits, JSON and event answers, and the race against a client that leaves."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from starlette.types import Message, Receive, Scope, Send

from parampara.errors import InvalidRequest, ParamparaError, PayloadTooLarge
from parampara.http import error_response, to_error
from parampara.keys import Principal

SLOW_BODY_SECONDS = 30
MAX_HEADER_BYTES = 65_536
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_JSON = (b"content-type", b"application/json")
EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class RequestTimeout(InvalidRequest):
    status = 408
    code = "request_timeout"


class Exchange:
    """Wraps one ASGI call. ``status`` is 499 until an answer starts."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive, self._send = receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        self.status = 499
        self.started = False
        self._sends_events = False
        self.principal: Principal | None = None
        self.route = "unmatched"
        self.model: str | None = None

    def header(self, name: bytes) -> str | None:
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    async def receive(self) -> Message:
        return await self._receive()

    async def body(self, limit: int) -> bytes:
        """The whole request body.

        Raises:
            PayloadTooLarge: over ``limit`` bytes; read no further than that.
            RequestTimeout: it arrives too slowly.
            ClientGone: the client left in the middle of it.
        """
        declared = self.headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large(limit)
        pieces, size = [], 0
        try:
            async with asyncio.timeout(SLOW_BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
                    if size > limit:
                        raise too_large(limit)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise RequestTimeout(f"The request body took longer than {SLOW_BODY_SECONDS} s to arrive.") from None

    async def json_object(self, limit: int) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            InvalidRequest: not JSON (invalid UTF-8 and NaN included), or not an object.
        """
        body = await self.body(limit)
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
        if not isinstance(data, dict):
            raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
        return data

    async def race(self, work: Awaitable[None]) -> None:
        """Run ``work`` and cancel it the moment the client disconnects. Call it once the request body is read.

        Cancelling closes the upstream connection, which is how the model server learns that nobody waits any more: in
        streams and in plain calls alike.

        Raises:
            ClientGone: the client left first.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._disconnected())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            await task
        finally:
            for pending in (task, gone):
                pending.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def start(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        await self.send({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def write(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def answer_json(self, body: Any, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        content = body if isinstance(body, bytes) else orjson.dumps(body)
        await self.start(status, [_JSON, (b"content-length", str(len(content)).encode()), *headers])
        await self.write(content, more=False)

    async def fail(self, error: Exception) -> None:
        """Answer with an error; once an event stream has begun the error becomes its last event, as the OpenAI SDK expects it.

        Raises:
            Exception: ``error`` itself, when anything else is under way. Only a connection that breaks off tells the client that
                a download is not complete: text after it would pass for a part of it.
        """
        if not self.started:
            await error_response(error)(self.scope, self._receive, self.send)
            return
        if not self._sends_events:
            raise error
        await self.write(b"data: " + orjson.dumps(to_error(error).body()) + b"\n\n", more=False)

    async def send(self, message: Message) -> None:
        """The ASGI ``send`` of this exchange: adds the request id and remembers the status."""
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = [(name, value) for name, value in message.get("headers", []) if name.lower() != b"x-request-id"]
            self._sends_events = any(name.lower() == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
            message = {**message, "headers": [*headers, (b"x-request-id", self.request_id.encode())]}
        await self._send(message)


Handler = Callable[[Exchange], Awaitable[None]]


def refuse_large_headers(scope: Scope) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if size > MAX_HEADER_BYTES:
        error = ParamparaError(f"The request headers have {size} bytes; the limit is {MAX_HEADER_BYTES}.", code="headers_too_large")
        error.status, error.type = 431, "invalid_request_error"
        raise error


def too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request body is over the limit of {limit} bytes (PARAMPARA_GATEWAY__MAX_BODY_BYTES).")
