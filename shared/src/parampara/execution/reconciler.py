"""Puts right what no worker and no request will: doorbells not sent, leases nobody misses, runs that stopped moving, litter."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import exists, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Job, Run
from parampara.db.session import transaction
from parampara.execution import doorbell, leases
from parampara.execution.runs import FINAL, lock_run, settle
from parampara.execution.sweeping import sweep
from parampara.settings import Settings
from parampara.telemetry import get_logger

_EVERY_SECONDS = 2.0
_log = get_logger(__name__)


@dataclass(frozen=True)
class Reconciled:
    expired: int
    settled: int
    rung: int


def reconcile_once(sessions: sessionmaker[Session], ring: Callable[[], int], *, max_crashes: int) -> Reconciled:
    """One pass: leases that ran out on queues without a worker, runs that do not follow from their jobs, then the outbox."""
    expired = leases.expire(sessions, max_crashes=max_crashes)
    settled = sum(_settle(sessions, run_id) for run_id in _resting_runs(sessions))
    return Reconciled(expired, settled, ring())


class Reconciler:
    """Runs :func:`reconcile_once` every two seconds in the control plane; several at once do no harm."""

    def __init__(self, settings: Settings, sessions: sessionmaker[Session]) -> None:
        self._settings, self._sessions = settings, sessions
        self._app = doorbell.make_app(settings)

    def run(self, stop: threading.Event) -> None:
        passes = 0
        while not stop.wait(_EVERY_SECONDS):
            try:
                done = reconcile_once(self._sessions, self._ring, max_crashes=self._settings.worker.max_crashes)
                if done.expired or done.settled:
                    _log.info("reconciled", expired_leases=done.expired, settled_runs=done.settled)
                if passes % 1000 == 0:
                    self._tidy()
                passes += 1
            except SQLAlchemyError as error:
                _log.warning("database is away; trying again", error=str(error).splitlines()[0])
            except Exception:  # noqa: BLE001 - the boundary of the thread: the next pass may do
                _log.exception("unexpected error in the reconciler")

    def _tidy(self) -> None:
        """The slow part, every half an hour."""
        with transaction(self._sessions) as session:
            doorbell.prune(session)
        if swept := sweep(self._sessions, self._settings):
            _log.info("removed what killed workers left", directories=[path.name for path in swept])

    def _ring(self) -> int:
        return doorbell.ring(self._app, self._sessions)


def _resting_runs(sessions: sessionmaker[Session]) -> list[str]:
    """Runs that are not over although none of their jobs is queued or running."""
    moving = exists().where(Job.run_id == Run.id, Job.state.in_(("queued", "running")))
    with transaction(sessions) as session:
        return list(session.scalars(select(Run.id).where(Run.state.not_in(FINAL), ~moving)))


def _settle(sessions: sessionmaker[Session], run_id: str) -> bool:
    with transaction(sessions) as session:
        run = lock_run(session, run_id)
        if run is None or run.state in FINAL:
            return False
        before = run.state
        settle(session, run)
        return run.state != before
