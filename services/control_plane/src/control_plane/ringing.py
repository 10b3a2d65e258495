"""Rings doorbells after COMMIT without making the client wait for the broker."""

from __future__ import annotations

import threading

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.execution.doorbell import make_app, ring
from parampara.settings import Settings

_CLOSE_SECONDS = 5

log = structlog.get_logger(__name__)


class Ringer:
    """One thread that empties the outbox whenever it is told to. What it cannot send, the reconciler sends later."""

    def __init__(self, settings: Settings, sessions: sessionmaker[Session]) -> None:
        self._celery = make_app(settings)
        self._sessions = sessions
        self._wanted = threading.Event()
        self._closed = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def ring_soon(self) -> None:
        """Return at once; the doorbells ring from the thread."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="doorbell", daemon=True)
                self._thread.start()
        self._wanted.set()

    def close(self) -> None:
        """End the thread; a doorbell that is being rung gets a few seconds."""
        self._closed = True
        self._wanted.set()
        if self._thread is not None:
            self._thread.join(timeout=_CLOSE_SECONDS)

    def _work(self) -> None:
        while self._wanted.wait() and not self._closed:
            self._wanted.clear()
            try:
                ring(self._celery, self._sessions)
            except SQLAlchemyError as error:
                log.warning("outbox could not be read; the reconciler rings later", error=str(error))
