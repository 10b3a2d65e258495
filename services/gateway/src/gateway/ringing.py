"""Rings doorbells after COMMIT, in a thread, so that no client waits for the broker."""

from __future__ import annotations

import threading

import structlog
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.execution.doorbell import make_app, ring
from parampara.settings import Settings

log = structlog.get_logger("gateway.ringing")


class Ringer:
    """One thread that empties the outbox whenever it is told to. What it can not send, the reconciler sends later."""

    def __init__(self, settings: Settings, sessions: sessionmaker[Session]) -> None:
        self._celery, self._sessions = make_app(settings), sessions
        self._wanted = threading.Event()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="doorbell", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ring_soon(self) -> None:
        """Return at once."""
        self._wanted.set()

    def close(self) -> None:
        self._closing = True
        self._wanted.set()

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing:
                return
            try:
                ring(self._celery, self._sessions)
            except SQLAlchemyError as error:
                log.warning("outbox could not be read; the reconciler rings later", error=str(error))
