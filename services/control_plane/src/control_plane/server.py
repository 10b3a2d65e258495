"""Runs the control plane: schema, first key, API and reconciler in one process."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from control_plane.app import create_app
from control_plane.services import health
from control_plane.services.files import sweep
from control_plane.services.health import schema_fault
from control_plane.services.keys import bootstrap_admin
from parampara.db import migrate
from parampara.db.session import make_engine, make_sessions
from parampara.errors import Unavailable
from parampara.execution.reconciler import Reconciler
from parampara.keys import read_pepper
from parampara.settings import Settings
from parampara.telemetry import configure_logging, start_metrics_server

_DATABASE_WAIT_SECONDS = 60
_GRACE_SECONDS = 10

log = structlog.get_logger(__name__)


def serve(settings: Settings, *, host: str, port: int, migrate_first: bool = True) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        Unavailable: a port is taken, or within a minute the database did not answer or had no schema (without
            ``migrate_first``).
    """
    configure_logging("control_plane", log_format=settings.log_format, level=settings.log_level)
    listener = _listen(host, port)
    engine = make_engine(settings.database, application="control_plane")
    sessions = make_sessions(engine)
    _wait_for_database((lambda: migrate.upgrade(settings.database.url)) if migrate_first else (lambda: _require_schema(sessions)))
    prepare(settings, sessions)
    if settings.control_plane.metrics_port is not None:
        serve_metrics(settings, sessions, settings.control_plane.metrics_port)
    stop = threading.Event()
    reconciler = threading.Thread(target=Reconciler(settings, sessions).run, args=(stop,), name="reconciler", daemon=True)
    reconciler.start()
    try:
        log.info("listening", host=host, port=listener.getsockname()[1])
        server = Server(create_app(settings, sessions))
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, server.handle_exit)  # uvicorn raises the signal again at its end, and then it must not kill
        server.run(sockets=[listener])
    finally:
        stop.set()
        reconciler.join(timeout=_GRACE_SECONDS)
        engine.dispose()


def prepare(settings: Settings, sessions: sessionmaker[Session]) -> None:
    """What a server does before its first request: the administrator's key, and away with what a killed one left."""
    bootstrap_admin(sessions, settings, read_pepper(settings))
    settings.files_dir.mkdir(parents=True, exist_ok=True)
    if removed := sweep(sessions, settings):
        log.info("removed what a killed server left", files=[path.name for path in removed])


def serve_metrics(settings: Settings, sessions: sessionmaker[Session], port: int) -> ThreadingHTTPServer:
    """``/metrics`` without a key, on a port that is not published. It goes on while the database is away, and so cannot check keys.

    Raises:
        Unavailable: the port is taken.
    """
    host = settings.control_plane.metrics_host
    try:
        return start_metrics_server(port, host=host, more=lambda: health.gauges(sessions, settings))
    except OSError as error:
        raise Unavailable(
            f"Cannot listen on {host}:{port} ({error.strerror}); see PARAMPARA_CONTROL_PLANE__METRICS_PORT and METRICS_HOST."
        ) from error


class Server(uvicorn.Server):
    """Uvicorn that tells open event streams to end when it is told to stop."""

    def __init__(self, app: FastAPI, *, host: str = "127.0.0.1", port: int = 0) -> None:
        config = uvicorn.Config(
            app, host=host, port=port, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_GRACE_SECONDS
        )
        super().__init__(config)
        self._state = app.state

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._state.stopping = True
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise Unavailable(
            f"Cannot listen on {host}:{port} ({error.strerror}). Stop what holds that port, or choose another one with "
            "PARAMPARA_CONTROL_PLANE__PORT."
        ) from error


def _require_schema(sessions: sessionmaker[Session]) -> None:
    if (fault := schema_fault(sessions)) is not None:
        raise Unavailable(f"The database is not ready: {fault}.")


def _wait_for_database(ask: Callable[[], None]) -> None:
    deadline = time.monotonic() + _DATABASE_WAIT_SECONDS
    while True:
        try:
            return ask()
        except (OperationalError, Unavailable) as error:
            if time.monotonic() > deadline:
                if isinstance(error, Unavailable):
                    raise
                raise Unavailable(f"The database does not answer ({error.orig}); is PARAMPARA_DATABASE__URL right?") from error
            log.warning("waiting for the database", error=str(error).splitlines()[0])
            time.sleep(1)
