"""Jobs as clients see them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from parampara.db.models import Attempt, Job
from parampara.schemas.api import AttemptObject, JobDetail, JobObject, unix, unix_or_none


def show(job: Job) -> JobObject:
    return JobObject.model_validate(_fields(job))


def show_detail(session: Session, job: Job) -> JobDetail:
    """A job with every attempt and the last lines of the newest one."""
    attempts = list(session.scalars(select(Attempt).where(Attempt.job_id == job.id).order_by(Attempt.number)))
    shown = [_attempt(attempt) for attempt in attempts]
    return JobDetail.model_validate(
        {**_fields(job), "spec": job.spec, "attempts": shown, "log_tail": attempts[-1].log_tail if attempts else None}
    )


def _fields(job: Job) -> dict[str, Any]:
    progress = job.progress or {}
    return {
        "id": job.id,
        "run_id": job.run_id,
        "name": job.name,
        "kind": job.kind,
        "queue": job.queue,
        "status": job.state,
        "depends_on": job.depends_on,
        "progress": {key: progress[key] for key in ("phase", "step", "total", "metrics") if progress.get(key) is not None},
        "eta_seconds": progress.get("eta_seconds") if job.state == "running" else None,
        "cancel_requested": job.cancel_requested,
        "crashes": job.crashes,
        "artifact_id": job.artifact_id,
        "reused_from": job.reused_from,
        "result": job.result,
        "error": job.error,
        "created_at": unix(job.created_at),
        "started_at": unix_or_none(job.started_at),
        "finished_at": unix_or_none(job.finished_at),
    }


def _attempt(attempt: Attempt) -> AttemptObject:
    return AttemptObject(
        id=attempt.id,
        number=attempt.number,
        status=attempt.state,
        worker=attempt.worker,
        exit_code=attempt.exit_code,
        error=attempt.error,
        log_tail=attempt.log_tail,
        started_at=unix(attempt.started_at),
        finished_at=unix_or_none(attempt.finished_at),
    )
