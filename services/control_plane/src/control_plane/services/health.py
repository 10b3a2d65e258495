"""Whether this server can do its work, and how much of it there is."""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path

import redis
from alembic.script import ScriptDirectory
from prometheus_client import CollectorRegistry, Gauge, generate_latest
from sqlalchemy import func, select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from parampara.db import migrate
from parampara.db.models import JOB_STATES, RUN_STATES, Job, Outbox, Run
from parampara.db.session import transaction
from parampara.plan import QUEUES
from parampara.schemas.api import Check, Readiness
from parampara.settings import Settings


def readiness(sessions: sessionmaker[Session], settings: Settings) -> Readiness:
    """Ready means: the database answers and has the newest schema. Redis is told but not needed: workers poll the table."""
    checks = {"database": _database(sessions), "redis": _redis(settings.redis.url)}
    failed = any(check.required and not check.ok for check in checks.values())
    return Readiness(status="not_ready" if failed else "ready", checks=checks)


def gauges(sessions: sessionmaker[Session], settings: Settings) -> bytes:
    """Disk space, runs, jobs and unsent doorbells, in Prometheus' text form; only disk space while the database is away."""
    return _disks(settings) + _rows(sessions)


def _disks(settings: Settings) -> bytes:
    """Folders may lie on disks of their own: each is told."""
    registry = CollectorRegistry()
    free = Gauge("parampara_disk_free_bytes", "Bytes that may still be written, by folder of the home.", ["folder"], registry=registry)
    size = Gauge("parampara_disk_size_bytes", "Size of the disk, by folder of the home.", ["folder"], registry=registry)
    for folder in (settings.artifacts_dir, settings.files_dir, settings.work_dir):
        if folder.is_dir():
            usage = shutil.disk_usage(folder)
            free.labels(folder.name).set(usage.free)
            size.labels(folder.name).set(usage.total)
    return generate_latest(registry)


def _rows(sessions: sessionmaker[Session]) -> bytes:
    registry = CollectorRegistry()
    runs = Gauge("parampara_runs", "Runs by state.", ["state"], registry=registry)
    jobs = Gauge("parampara_jobs", "Jobs by kind and state.", ["kind", "state"], registry=registry)
    unsent = Gauge("parampara_outbox_unsent", "Doorbells not yet sent.", registry=registry)
    try:
        with transaction(sessions) as session:
            by_state = dict(session.execute(select(Run.state, func.count()).group_by(Run.state)).tuples().all())
            by_kind = list(session.execute(select(Job.kind, Job.state, func.count()).group_by(Job.kind, Job.state)))
            unsent.set(session.scalar(select(func.count()).select_from(Outbox).where(Outbox.sent_at.is_(None))) or 0)
    except SQLAlchemyError:
        return b""
    for state in RUN_STATES:
        runs.labels(state).set(by_state.get(state, 0))
    for kind in QUEUES:  # a count that first shows when it is 1 is no rise that an alert could see
        for state in JOB_STATES:
            jobs.labels(kind, state).set(0)
    for kind, state, count in by_kind:
        jobs.labels(kind, state).set(count)
    return generate_latest(registry)


@lru_cache
def newest_revision() -> str | None:
    return ScriptDirectory(str(Path(migrate.__file__).with_name("migrations"))).get_current_head()


def schema_fault(sessions: sessionmaker[Session]) -> str | None:
    """What keeps the schema from being the newest; None when it is.

    Raises:
        SQLAlchemyError: the database does not answer.
    """
    with transaction(sessions) as session:
        revision = _revision(session)
    if revision == newest_revision():
        return None
    return f"schema {revision} is not {newest_revision()}; run python -m parampara.db.migrate"


def _database(sessions: sessionmaker[Session]) -> Check:
    try:
        fault = schema_fault(sessions)
    except SQLAlchemyError as error:
        return Check(ok=False, required=True, detail=f"does not answer: {type(error).__name__}")
    return Check(ok=fault is None, required=True, detail=fault or f"schema {newest_revision()}")


def _revision(session: Session) -> str | None:
    """Alembic's own reading writes two lines into the log, and probes ask every few seconds."""
    if session.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    return session.scalar(text("SELECT version_num FROM alembic_version"))


def _redis(url: str) -> Check:
    try:
        with redis.Redis.from_url(url, socket_connect_timeout=1, socket_timeout=1) as client:
            client.ping()
    except redis.RedisError as error:
        return Check(ok=False, required=False, detail=f"does not answer: {type(error).__name__}; workers poll the database meanwhile")
    return Check(ok=True, required=False, detail="answers")
