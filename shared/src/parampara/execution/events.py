"""Writing the two append-only tables: a run's events, and the outbox of doorbells still to ring."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy.orm import Session

from parampara.db.models import Event, Job, Outbox, Run
from parampara.progress import Level

EventType = Literal["message", "metrics", "state"]


def job_event(
    session: Session,
    job: Job,
    message: str,
    /,
    *,
    type: EventType = "message",
    level: Level = "info",
    attempt: int | None = None,
    **data: Any,
) -> None:
    session.add(Event(run_id=job.run_id, job_id=job.id, attempt=attempt, type=type, level=level, message=message, data=data))


def job_state(session: Session, job: Job, message: str, *, level: Level = "info", attempt: int | None = None) -> None:
    """Tell that a job came into the state it is in now."""
    job_event(session, job, message, type="state", level=level, attempt=attempt, job=job.name, kind=job.kind, state=job.state)


def run_state(session: Session, run: Run, message: str, *, level: Level = "info") -> None:
    session.add(Event(run_id=run.id, type="state", level=level, message=message, data={"state": run.state}))


def announce(session: Session, job: Job) -> None:
    """Have the doorbell rung for a job that is now queued, once this transaction has committed."""
    session.add(Outbox(job_id=job.id, queue=job.queue))
