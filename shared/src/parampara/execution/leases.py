"""Leases: claiming a job, keeping it, telling its progress. Every write names the fence that the claim was given.

A claim raises the job's ``fence`` by one; a writer whose fence is not the row's, or whose job is no longer running, changes
nothing and learns so. Time is always the database's ``now()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Attempt, Event, Job, new_id
from parampara.db.session import transaction
from parampara.execution.endings import count_crash
from parampara.execution.events import job_state
from parampara.execution.runs import lock_run, settle
from parampara.schemas.stages import Kind


@dataclass(frozen=True)
class Claim:
    """The right to work on one attempt of a job, as long as its lease is renewed."""

    job_id: str
    run_id: str | None
    name: str
    kind: Kind
    fence: int
    attempt_id: str
    attempt: int
    worker: str
    progress: dict[str, Any]
    """``best_step`` and ``crash_step`` of earlier attempts."""


@dataclass(frozen=True)
class Beat:
    """``alive`` is False once another worker or a cancel took the job away: stop at once, write nothing."""

    alive: bool
    cancel_requested: bool = False


def guard(claim: Claim) -> ColumnElement[bool]:
    """The condition of every write under a claim."""
    return and_(Job.id == claim.job_id, Job.fence == claim.fence, Job.state == "running")


def take(
    sessions: sessionmaker[Session], *, queue: str, worker: str, lease_seconds: float, max_crashes: int, job_id: str | None = None
) -> Claim | None:
    """What a worker calls: give up expired leases of the queue, then claim a job (``job_id``: that one or none)."""
    expire(sessions, queue=queue, max_crashes=max_crashes)
    with transaction(sessions) as session:
        return claim(session, queue=queue, worker=worker, lease_seconds=lease_seconds, job_id=job_id)


def claim(session: Session, *, queue: str, worker: str, lease_seconds: float, job_id: str | None = None) -> Claim | None:
    """Claim the oldest queued job of a queue with one guarded UPDATE; None when there is none to have."""
    wanted = [Job.queue == queue, Job.state == "queued", or_(Job.not_before.is_(None), Job.not_before <= func.now())]
    if job_id is not None:
        wanted.append(Job.id == job_id)
    oldest = select(Job.id).where(*wanted).order_by(Job.created_at, Job.position, Job.id).limit(1)
    statement = (
        update(Job)
        .where(Job.id == oldest.with_for_update(skip_locked=True, key_share=True).scalar_subquery())
        .values(
            state="running",
            fence=Job.fence + 1,
            owner=worker,
            lease_until=func.now() + timedelta(seconds=lease_seconds),
            started_at=func.coalesce(Job.started_at, func.now()),
        )
        .returning(Job)
    )
    job = session.scalars(statement, execution_options={"synchronize_session": False}).one_or_none()
    if job is None:
        return None
    job.progress = {key: value for key, value in job.progress.items() if key in ("best_step", "crash_step")}
    number = 1 + session.execute(select(func.coalesce(func.max(Attempt.number), 0)).where(Attempt.job_id == job.id)).scalar_one()
    attempt = Attempt(id=new_id("att_"), job_id=job.id, number=number, fence=job.fence, worker=worker)
    session.add(attempt)
    job_state(session, job, f"{job.name} started (attempt {number})", attempt=number)
    return Claim(job.id, job.run_id, job.name, job.kind, job.fence, attempt.id, number, worker, job.progress)  # type: ignore[arg-type]


def expire(sessions: sessionmaker[Session], *, max_crashes: int, queue: str | None = None, job_id: str | None = None) -> int:
    """Take back jobs whose lease ran out: the attempt is ``lost``, the job queued again or, after too many, failed.

    One transaction per job. Returns how many were taken back.
    """
    expired = [Job.state == "running", Job.lease_until < func.now()]
    narrow = [*expired, *([Job.queue == queue] if queue else []), *([Job.id == job_id] if job_id else [])]
    with transaction(sessions) as session:
        found = session.execute(select(Job.id, Job.run_id).where(*narrow)).all()
    taken = 0
    for lost_id, run_id in found:
        with transaction(sessions) as session:
            run = lock_run(session, run_id)
            query = select(Job).where(Job.id == lost_id, *expired).with_for_update(key_share=True, skip_locked=True)
            if (job := session.scalars(query).one_or_none()) is None:
                continue  # its worker came back, or another one was quicker
            error = {"code": "lease_lost", "message": f"worker {job.owner} stopped renewing its lease"}
            close_attempt(session, job.id, job.fence, "lost", error=error)
            count_crash(session, job, error=error, max_crashes=max_crashes)
            session.flush()
            settle(session, run)
            taken += 1
    return taken


def heartbeat(session: Session, claim: Claim, *, lease_seconds: float) -> Beat:
    """Renew the lease."""
    renewed = func.now() + timedelta(seconds=lease_seconds)
    return _beat(session, update(Job).where(guard(claim)).values(lease_until=renewed).returning(Job.cancel_requested))


def record(session: Session, claim: Claim, *, progress: dict[str, Any], events: Sequence[dict[str, Any]] = ()) -> Beat:
    """Write progress and events of the attempt; each event is ``{"type", "level", "message", "data"}``."""
    beat = _beat(session, update(Job).where(guard(claim)).values(progress=progress).returning(Job.cancel_requested))
    if beat.alive and events:
        session.add_all(Event(run_id=claim.run_id, job_id=claim.job_id, attempt=claim.attempt, **event) for event in events)
    return beat


def check(session: Session, claim: Claim) -> Beat:
    """Read whether the claim still holds, without writing."""
    return _beat(session, select(Job.cancel_requested).where(guard(claim)))


def hold(session: Session, claim: Claim) -> Job | None:
    """Lock the job (its run first) for a write under the claim; None when the claim no longer holds."""
    lock_run(session, claim.run_id)
    query = select(Job).where(guard(claim)).with_for_update(key_share=True).execution_options(populate_existing=True)
    return session.scalars(query).one_or_none()


def close_attempt(
    session: Session,
    job_id: str,
    fence: int,
    state: str,
    *,
    exit_code: int | None = None,
    error: dict[str, Any] | None = None,
    log_tail: str | None = None,
) -> None:
    """End the attempt that holds ``fence``; an attempt that is over already stays as it is."""
    values = {"state": state, "exit_code": exit_code, "error": error, "log_tail": log_tail, "finished_at": func.now()}
    session.execute(update(Attempt).where(Attempt.job_id == job_id, Attempt.fence == fence, Attempt.state == "running").values(values))


def _beat(session: Session, statement: Any) -> Beat:
    row = session.execute(statement, execution_options={"synchronize_session": False}).one_or_none()
    return Beat(alive=False) if row is None else Beat(alive=True, cancel_requested=row[0])
