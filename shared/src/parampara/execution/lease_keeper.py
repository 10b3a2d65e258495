"""Keeps a claim alive from a thread of its own, and tells at once when it is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.session import transaction
from parampara.execution import metrics
from parampara.execution.leases import Beat, Claim, heartbeat
from parampara.settings import WorkerSettings
from parampara.telemetry import get_logger

_log = get_logger(__name__)


class LeaseKeeper:
    """Renews a lease every ``heartbeat_seconds`` while used as a context manager.

    ``lost``: another worker holds the job, or it was ended: nothing may be written any more. ``outdated``: the lease could
    not be renewed for its whole length (the database is away), so somebody else may hold it. Either calls ``on_gone``.

    Its age is watched by a second thread: a database that does not answer at all keeps the first one in its statement.
    """

    def __init__(self, sessions: sessionmaker[Session], claim: Claim, settings: WorkerSettings) -> None:
        self.lost = threading.Event()
        self.outdated = threading.Event()
        self.cancel_requested = threading.Event()
        self.on_gone: Callable[[], None] = lambda: None
        self._sessions, self._claim, self._settings = sessions, claim, settings
        self._renewed = time.monotonic()
        self._done = threading.Event()
        self._threads = [threading.Thread(target=run, name=f"lease {claim.job_id}", daemon=True) for run in (self._renew, self._watch)]

    def __enter__(self) -> LeaseKeeper:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    @property
    def gone(self) -> bool:
        return self.lost.is_set() or self.outdated.is_set()

    def note(self, beat: Beat) -> None:
        """Take in what any guarded statement has told."""
        if beat.cancel_requested:
            self.cancel_requested.set()
        if not beat.alive and not self.lost.is_set():
            self.lost.set()
            _log.warning("lease lost: another worker has the job, or it was ended")
            self.on_gone()

    def _renew(self) -> None:
        wait = self._settings.heartbeat_seconds
        while not self._done.wait(wait) and not self.lost.is_set():
            started = time.monotonic()
            try:
                with transaction(self._sessions) as session:
                    beat = heartbeat(session, self._claim, lease_seconds=self._settings.lease_seconds)
            except SQLAlchemyError as error:
                wait = min(1.0, self._settings.heartbeat_seconds)
                _log.warning("heartbeat failed", error=str(error).splitlines()[0])
                continue
            wait, self._renewed = self._settings.heartbeat_seconds, started
            metrics.sign_of_life()
            self.note(beat)

    def _watch(self) -> None:
        left = self._settings.lease_seconds
        while left > 0:
            if self._done.wait(left) or self.lost.is_set():
                return
            left = self._renewed + self._settings.lease_seconds - time.monotonic()
        self.outdated.set()
        _log.warning("lease not renewed for its whole length; stopping the stage, for another worker may start it")
        self.on_gone()
