"""``/v1/jobs``: single stages, with attempts, log and loss curve."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from control_plane.dependencies import After, Limit, Ordering, SessionDep, SettingsDep, requires
from control_plane.services import events, jobs, metrics
from control_plane.transactions import after_commit
from parampara.execution.queue import request_cancel, retry_job
from parampara.schemas.api import EventObject, JobDetail, JobMetrics, JobObject, Order, Page, State
from parampara.schemas.stages import Kind

router = APIRouter(prefix="/v1/jobs", tags=["Jobs"], dependencies=[requires("jobs")])


@router.get("", summary="List jobs")
def list_jobs(
    session: SessionDep,
    status: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
    kind: Kind | None = None,
    run_id: Annotated[str | None, Query(max_length=64)] = None,
    after: After = None,
    limit: Limit = 20,
    order: Ordering = "desc",
) -> Page[JobObject]:
    return jobs.list_jobs(session, state=status, kind=kind, run_id=run_id, after=after, limit=limit, order=order)


@router.get("/{job_id}", summary="Get a job")
def get_job(session: SessionDep, job_id: str) -> JobDetail:
    """With every attempt and the last lines of the newest one's log."""
    return jobs.get(session, job_id)


@router.post("/{job_id}/cancel", summary="Cancel a job")
def cancel_job(request: Request, session: SessionDep, job_id: str) -> JobDetail:
    """Jobs of the same run that need it are cancelled with it."""
    request_cancel(session, jobs.get_row(session, job_id).id)
    return _steered(request, session, job_id)


@router.post("/{job_id}/retry", summary="Retry a job")
def retry(request: Request, session: SessionDep, job_id: str) -> JobDetail:
    """Puts a failed or cancelled job back, and what was cancelled because of it. Earlier attempts stay on record."""
    retry_job(session, jobs.get_row(session, job_id).id)
    return _steered(request, session, job_id)


@router.get("/{job_id}/events", summary="List a job's events")
def list_events(
    session: SessionDep,
    job_id: str,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    order: Annotated[Order, Query(description="`asc`: oldest first.")] = "asc",
) -> Page[EventObject]:
    jobs.get_row(session, job_id)
    return events.list_events(session, job_id=job_id, after=after, limit=limit, order=order)


@router.get("/{job_id}/metrics", summary="A job's loss curve")
def get_metrics(
    session: SessionDep,
    settings: SettingsDep,
    job_id: str,
    points: Annotated[int, Query(ge=2, le=10_000, description="At most this many points, evenly spaced.")] = 1000,
) -> JobMetrics:
    """Loss, learning rate, tokens/s and the like by step, as the stage reported them."""
    return metrics.of_job(session, settings, jobs.get_row(session, job_id), points=points)


def _steered(request: Request, session: SessionDep, job_id: str) -> JobDetail:
    after_commit(session, request.app.state.ringer.ring_soon)
    session.flush()
    session.expire_all()
    return jobs.get(session, job_id)
