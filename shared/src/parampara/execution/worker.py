"""The worker of one queue: a Celery consumer for doorbells, beside a thread that polls the table.

Whoever hears of a job first claims and supervises it, one at a time per worker. A message is acknowledged before it is
worked on and says no more than "look at this job"; losing it, or the whole broker, costs at most ``poll_seconds``.
"""

from __future__ import annotations

import os
import random
import socket
import threading
from collections.abc import Sequence
from typing import Any

from celery import Celery, signals
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.session import is_away, make_engine, make_sessions, transaction
from parampara.execution import doorbell, leases, metrics
from parampara.execution.preloaded import Preloaded
from parampara.execution.supervisor import Supervisor
from parampara.settings import Settings, get_settings
from parampara.storage import LocalStorage
from parampara.telemetry import configure_logging, get_logger, start_metrics_server

_log = get_logger(__name__)


class Worker:
    """Takes jobs of one queue, one at a time, from two sides: :meth:`offer` (a message came) and :meth:`poll` (a thread)."""

    def __init__(
        self,
        settings: Settings,
        sessions: sessionmaker[Session],
        app: Celery,
        *,
        service: str,
        queue: str,
        preloaded: Preloaded | None = None,
    ) -> None:
        self.stopping = threading.Event()
        self._settings, self._sessions, self._app, self._queue = settings, sessions, app, queue
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._supervisor = Supervisor(settings, sessions, service=service, stopping=self.stopping, preloaded=preloaded)
        self._busy = threading.Lock()
        self._polling: threading.Thread | None = None

    def offer(self, job_id: str | None = None) -> int:
        """Work on ``job_id`` (None: on any job), then on whatever else is queued; returns how many attempts were made.

        Returns at once when this worker is busy: its poll or another worker finds the job.
        """
        if not self._busy.acquire(blocking=False):
            return 0
        try:
            made = 0
            while not self.stopping.is_set() and (claim := self._take(job_id)) is not None:
                self._supervisor.run(claim)
                doorbell.ring(self._app, self._sessions)
                made, job_id = made + 1, None
            return made
        except SQLAlchemyError as error:
            if not is_away(error):
                raise
            _log.warning("database is away; trying again", error=str(error).splitlines()[0])
            return 0
        finally:
            self._busy.release()

    def start_polling(self) -> None:
        """Start the thread that polls; not only when Celery is ready, for it never is while the broker is away."""
        self._polling = threading.Thread(target=self.poll, name="poll")
        self._polling.start()

    def stop(self) -> None:
        """Give the job back and end the thread that polls."""
        self.stopping.set()
        if self._polling is not None:
            self._polling.join()

    def poll(self) -> None:
        """Look into the table every ``poll_seconds`` until the worker stops."""
        while not self.stopping.is_set():
            try:
                self.offer()
            except Exception:  # noqa: BLE001 - the boundary of the worker: it takes the next job, whatever this one did
                _log.exception("unexpected error in the worker")
            self.stopping.wait(self._settings.worker.poll_seconds * random.uniform(0.8, 1.2))  # so that workers do not march in step

    def faults(self) -> list[str]:
        """What keeps this worker from taking jobs now."""
        if self.stopping.is_set():
            return ["stopping"]
        if self._polling is not None and not self._polling.is_alive():
            return ["the thread that polls for jobs has ended; restart this worker"]
        try:
            with transaction(self._sessions) as session:
                session.execute(text("SELECT 1"))
        except SQLAlchemyError as error:
            return [f"database: {str(error).splitlines()[0]}"]
        return []

    def _take(self, job_id: str | None) -> leases.Claim | None:
        limits = self._settings.worker
        claim = leases.take(
            self._sessions,
            queue=self._queue,
            worker=self._name,
            lease_seconds=limits.lease_seconds,
            max_crashes=limits.max_crashes,
            job_id=job_id,
        )
        metrics.sign_of_life()
        return claim


def serve(service: str, queue: str, *, preloads: Sequence[str] = ()) -> int:
    """Run ``python -m <service> worker`` until SIGTERM or SIGINT; returns the exit code."""
    settings = get_settings()
    preloaded = Preloaded(service, settings.worker.preload) if settings.worker.preload in preloads else None
    if preloaded is not None:
        preloaded.start()  # in the main thread, with which it ends
    configure_logging(f"{service}-worker", log_format=settings.log_format, level=settings.log_level)
    engine = make_engine(settings.database, application=f"{service}-worker")
    app = doorbell.make_app(settings)
    worker = Worker(settings, make_sessions(engine), app, service=service, queue=queue, preloaded=preloaded)
    if settings.worker.metrics_port is not None:
        start_metrics_server(settings.worker.metrics_port, host=settings.worker.metrics_host, ready=worker.faults)
    LocalStorage(settings.artifacts_dir).sweep()
    worker.start_polling()
    doorbell.greet(settings)
    try:
        _consume(app, worker, queue)
    finally:
        worker.stop()
        if preloaded is not None:
            preloaded.stop()
        engine.dispose()
    return 0


def _consume(app: Celery, worker: Worker, queue: str) -> None:
    """Celery's own loop, in the main thread; it returns after a warm shutdown."""

    @app.task(name=doorbell.TASK, ignore_result=True)
    def run_job(job_id: str) -> None:
        worker.offer(str(job_id))

    def keep_our_logging(**_: Any) -> None:
        return  # being connected is what keeps Celery from configuring logging

    def begin_to_stop(**_: Any) -> None:
        worker.stopping.set()

    signals.setup_logging.connect(keep_our_logging, weak=False)
    signals.worker_shutting_down.connect(begin_to_stop, weak=False)
    options = {"pool": "threads", "concurrency": 1, "queues": [queue], "hostname": f"{queue}@%h", "loglevel": "WARNING", "quiet": True}
    app.Worker(without_gossip=True, without_mingle=True, without_heartbeat=True, **options).start()
