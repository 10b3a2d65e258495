"""What every HTTP service does at its border: one error shape, request ids, body limits, metrics, access log.

The error shape is OpenAI's, ``{"error": {"message", "type", "param", "code"}}``, on every status, FastAPI's own 404, 405
and 422 (as 400) included. All of it is plain ASGI: a ``BaseHTTPMiddleware`` would hide client disconnects.

Only FastAPI services import this module; the rest of the shared package does not need FastAPI.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import Counter, Histogram
from sqlalchemy.exc import DataError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from parampara.errors import InvalidRequest, NotFound, ParamparaError, PayloadTooLarge, Unavailable

REQUESTS = Counter("parampara_http_requests", "HTTP requests by route and status.", ["service", "method", "route", "status"])
SECONDS = Histogram(
    "parampara_http_request_seconds",
    "Time until the whole answer was sent.",
    ["service", "method", "route"],
    buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
_ASSETS = ("swagger-ui-bundle.js", "swagger-ui.css")
DOCS_PATHS = frozenset({"/docs", "/openapi.json", *(f"/docs/assets/{name}" for name in _ASSETS)})
"""What a browser asks for to show the interactive documentation."""
_METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_QUIET = {"/health", "/livez", "/readyz", "/metrics"}
_RETRY_AFTER = {429: "1", 503: "2"}

log = structlog.get_logger("parampara.http")


def install_error_handlers(
    app: FastAPI,
    *,
    service: str | None = None,
    max_body_bytes: int | None = None,
    larger_bodies: Mapping[str, int] | None = None,
    slow_body_seconds: float = 30,
) -> None:
    """Give ``app`` the error shape on every status and the border of :class:`Boundary`.

    Call it after every other ``add_middleware``: the boundary has to be the outermost one. ``service`` labels the metrics;
    without ``max_body_bytes`` the application limits bodies itself.
    """
    app.add_exception_handler(HTTPException, _handle)
    app.add_exception_handler(RequestValidationError, _handle)
    app.add_exception_handler(ParamparaError, _handle)
    app.add_middleware(
        Boundary,
        service=service or app.title,
        max_body_bytes=max_body_bytes,
        larger_bodies=larger_bodies or {},
        slow_body_seconds=slow_body_seconds,
    )


def exit_zero_on_sigterm() -> None:
    """Let a process that is told to stop exit with 0, whether it serves already or still loads. Call it first in ``main``.

    Uvicorn ends its requests, then raises the signal again: by default that kills the process, which looks like a crash (143).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))


def install_docs(app: FastAPI) -> None:
    """Add ``/docs``: Swagger UI over ``/openapi.json``, its script and style from this server.

    FastAPI's own page loads them from a CDN, and is empty where nothing outside can be reached. Make ``app`` with ``docs_url=None``.
    """
    package = importlib.util.find_spec("fastapi_offline")  # a carrier of the files; its code is not used
    if package is None or package.origin is None:
        raise RuntimeError("fastapi-offline is not installed: it holds the files of /docs.")
    static = Path(package.origin).parent / "static"

    def docs() -> HTMLResponse:
        script, style = (f"/docs/assets/{name}" for name in _ASSETS)
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=script,
            swagger_css_url=style,
            swagger_favicon_url="data:,",
            swagger_ui_parameters={"validatorUrl": None},
        )

    app.add_api_route("/docs", docs, include_in_schema=False)
    for name in _ASSETS:
        app.add_api_route(f"/docs/assets/{name}", _file(static / name), include_in_schema=False)


def _file(path: Path) -> Callable[[], FileResponse]:
    def answer() -> FileResponse:
        return FileResponse(path, headers={"Cache-Control": "max-age=86400"})

    return answer


class Boundary:
    """Outermost ASGI layer: request id, body limit, slow-body limit, last-resort errors, metrics and access log.

    ``larger_bodies`` maps a path (``POST`` to exactly it) to its own limit in bytes.
    """

    def __init__(
        self, app: ASGIApp, *, service: str, max_body_bytes: int | None, larger_bodies: Mapping[str, int], slow_body_seconds: float
    ) -> None:
        self.app = app
        self.service = service
        self.max_body_bytes = max_body_bytes
        self.larger_bodies = larger_bodies
        self.slow_body_seconds = slow_body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, limit=self._limit(scope), slow_body_seconds=self.slow_body_seconds)
        started = time.perf_counter()
        with structlog.contextvars.bound_contextvars(request_id=exchange.request_id):
            try:
                exchange.refuse_declared_size()
                await self.app(scope, exchange.receive, exchange.send)
            except ClientDisconnect:
                exchange.status = 499
            except Exception as error:  # noqa: BLE001 - the HTTP boundary: whatever is left becomes an answer, never a dropped connection
                await self._answer(error, scope, exchange)
            finally:
                self._account(scope, exchange.status, time.perf_counter() - started)

    async def _answer(self, error: Exception, scope: Scope, exchange: _Exchange) -> None:
        if exchange.started:
            log.error("response broken off", exc_info=error)
            raise error
        await error_response(error)(scope, exchange.receive, exchange.send)

    def _limit(self, scope: Scope) -> float:
        own = self.larger_bodies.get(scope["path"].rstrip("/")) if scope["method"] == "POST" else None
        return own or self.max_body_bytes or float("inf")

    def _account(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        REQUESTS.labels(self.service, method, route, str(status)).inc()
        SECONDS.labels(self.service, method, route).observe(seconds)
        write = log.debug if route in _QUIET else log.info
        write("request", method=method, route=route, status=status, ms=round(seconds * 1000, 1))


class _Exchange:
    """One request and its answer, watched."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, limit: float, slow_body_seconds: float) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        self.status = 500
        self.started = False
        self._declared = headers.get("content-length", "")
        self._receive, self._send = receive, send
        self._limit, self._slow_body_seconds = limit, slow_body_seconds
        self._received = 0
        self._body_done = False

    def refuse_declared_size(self) -> None:
        if self._declared.isdigit() and int(self._declared[:20]) > self._limit:
            raise _too_large(self._limit)

    async def receive(self) -> Message:
        if self._body_done:
            return await self._receive()
        try:
            async with asyncio.timeout(self._slow_body_seconds):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"The request body stopped arriving for {self._slow_body_seconds:g} s.") from None
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self._body_done = not message.get("more_body", False)
            if self._received > self._limit:
                raise _too_large(self._limit)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            headers.setdefault("X-Content-Type-Options", "nosniff")
        await self._send(message)


def error_response(error: Exception) -> Response:
    """The answer to an exception; an unexpected one is logged with its traceback and told without it."""
    known = to_error(error)
    if known is error and known.status >= 500:  # raised on purpose: the message says it all
        log.warning("request failed", code=known.code, reason=known.message, cause=repr(error.__cause__) if error.__cause__ else None)
    elif known.status >= 500:
        log.error("request failed", code=known.code, exc_info=error)
    # ASCII only: an offending value may hold halves of surrogate pairs, which UTF-8 cannot carry
    response = Response(json.dumps(known.body()), status_code=known.status, media_type="application/json")
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    if known.status in _RETRY_AFTER:
        response.headers.setdefault("Retry-After", _RETRY_AFTER[known.status])
    elif known.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    elif known.status < 500 and known.status != 408:
        response.headers["X-Should-Retry"] = "false"  # the OpenAI SDK obeys it
    return response


def to_error(error: Exception) -> ParamparaError:
    """Any exception as one of ours."""
    if isinstance(error, ParamparaError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(list(error.errors()))
    if isinstance(error, HTTPException):
        return _from_status(error)
    if isinstance(error, DataError):
        return InvalidRequest(
            "A value holds characters or a number that cannot be stored (a NUL character, a half surrogate, out of range)."
        )
    if isinstance(error, OperationalError | InterfaceError | PoolTimeout) or (
        isinstance(error, DBAPIError) and error.connection_invalidated
    ):
        return Unavailable("The database does not answer just now; try again in a moment.", code="database_unavailable")
    return ParamparaError("Something went wrong on our side; the request id in X-Request-Id leads to it in the logs.")


async def _handle(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 404 and error.detail == "Not Found":
        error = NotFound(f"No such URL: {request.method} {request.url.path}. /docs lists what there is.", code="unknown_url")
    return error_response(error)


def _from_status(error: HTTPException) -> ParamparaError:
    known = ParamparaError(
        str(error.detail), code=_CODES.get(error.status_code, "internal_error" if error.status_code >= 500 else "invalid_request")
    )
    known.status = error.status_code
    known.type = "server_error" if error.status_code >= 500 else "invalid_request_error"
    return known


_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: PayloadTooLarge.code}


def _too_large(limit: float) -> HTTPException:
    # an HTTPException: FastAPI turns every other exception that body parsing meets into a bare 400
    return HTTPException(413, f"The request body is over this route's limit of {limit:.0f} bytes.")


def _invalid(faults: list[dict[str, Any]]) -> InvalidRequest:
    """FastAPI's validation report as one message that names path, value and limit of each fault."""
    texts = [_fault(fault) for fault in faults[:5]]
    code = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter", "json_invalid": "invalid_json"}
    return InvalidRequest("; ".join(text for _, text in texts), param=texts[0][0], code=code.get(faults[0]["type"], "invalid_value"))


def _fault(fault: dict[str, Any]) -> tuple[str | None, str]:
    if fault["type"] == "json_invalid":
        return None, f"The body is not JSON: {fault.get('ctx', {}).get('error', 'malformed')} at character {fault['loc'][-1]}."
    path = ".".join(str(part) for part in fault["loc"][1:]) or None
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return path, f"{path} is not a known key"
    if fault["type"] == "missing":
        return path, f"{path or 'the body'} is missing"
    if path is None and fault["type"].startswith(("model", "dict")):
        return None, "The body is not a JSON object; send one with Content-Type: application/json."
    shown = ascii(fault.get("input"))
    got = f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})" if not isinstance(fault.get("input"), dict | list) else ""
    return path, f"{path or 'the body'}: {message}{got}"
