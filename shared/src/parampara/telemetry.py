"""Structured logs and Prometheus metrics, the same in every service.

Every log record carries the service's name and whatever :func:`bind` put into the context (``run_id``, ``job_id``,
``attempt``), also records that libraries write through the standard ``logging`` module.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest, make_asgi_app

from parampara.settings import get_settings

_SECRET = re.compile(r"(?i)(bearer\s+|sk-|pk-|\bpp_|://[^/\s:@]*:)[^\s@\"',;]{6,}")


def configure_logging(service: str, *, log_format: str | None = None, level: str | None = None) -> None:
    """Send all logs of this process to stderr: one JSON object a line, or coloured text with ``log_format="console"``."""
    settings = get_settings()
    log_format, level = log_format or settings.log_format, (level or settings.log_level).upper()
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _name_service(service),
    ]
    # plain tracebacks: the fancy ones take seconds to draw, in the event loop, and print the values of local variables
    in_colour = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
    renderer = in_colour if log_format == "console" else structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        # redact is the last before the renderer: a traceback is text by then
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            redact,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(handlers=[handler], level=level, force=True)
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    return structlog.stdlib.get_logger(name)


@contextlib.contextmanager
def bind(**values: Any) -> Iterator[None]:
    """Put ``run_id``, ``job_id``... on every record that this thread or task logs inside the block."""
    with structlog.contextvars.bound_contextvars(**{key: value for key, value in values.items() if value is not None}):
        yield


def redact(logger: Any, method: str, record: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Cut keys, bearer tokens and passwords in URLs out of every text of a record, however deep it lies."""
    return {key: _redacted(value) for key, value in record.items()}


def _redacted(value: Any) -> Any:
    if isinstance(value, bool | int | float | None):
        return value
    if isinstance(value, dict):
        return {_redacted(key): _redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted(item) for item in value]
    # what is not text yet would be written as its repr: an exception with a URL in its message, say
    return _SECRET.sub(r"\1***", value if isinstance(value, str) else repr(value))


def metrics_app() -> Any:
    """An ASGI app with this process's metrics, to mount at ``/metrics``."""
    return make_asgi_app()


def start_metrics_server(
    port: int, *, host: str = "127.0.0.1", ready: Callable[[], Iterable[str]] = tuple, more: Callable[[], bytes] = bytes
) -> ThreadingHTTPServer:
    """Serve ``/metrics``, ``/livez`` and ``/readyz`` from a thread; for processes that have no HTTP server, or one that asks for keys.

    ``ready`` returns what keeps the process from being ready; nothing means ready. ``more`` adds to the metrics. ``port`` 0 takes
    any free port.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                self._answer(200, generate_latest() + more(), CONTENT_TYPE_LATEST)
            elif path in ("/livez", "/health"):
                self._answer(200, b"ok\n")
            elif path == "/readyz":
                faults = list(ready())
                self._answer(503 if faults else 200, ("\n".join(faults) or "ok").encode() + b"\n")
            else:
                self._answer(404, b"there are /metrics, /livez and /readyz here\n")

        def _answer(self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return  # a probe every second is no news

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def _name_service(service: str) -> Callable[[Any, str, structlog.typing.EventDict], structlog.typing.EventDict]:
    def add(logger: Any, method: str, record: structlog.typing.EventDict) -> structlog.typing.EventDict:
        record.setdefault("service", service)
        return record

    return add
