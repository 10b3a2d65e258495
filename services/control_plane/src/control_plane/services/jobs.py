"""Jobs: one stage of a run each, or an ingest or deployment of its own."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from control_plane.services import job_views
from control_plane.services.paging import page
from parampara.db.models import Job
from parampara.errors import NotFound
from parampara.schemas.api import JobDetail, JobObject, Order, Page, State
from parampara.schemas.stages import Kind


def list_jobs(
    session: Session, *, state: State | None, kind: Kind | None, run_id: str | None, after: str | None, limit: int, order: Order
) -> Page[JobObject]:
    wanted = {Job.state: state, Job.kind: kind, Job.run_id: run_id}
    query = select(Job).where(*(column == value for column, value in wanted.items() if value is not None))
    return page(session, query, key=Job.id, created=Job.created_at, after=after, limit=limit, order=order, show=job_views.show)


def get(session: Session, job_id: str) -> JobDetail:
    return job_views.show_detail(session, get_row(session, job_id))


def get_row(session: Session, job_id: str) -> Job:
    job = session.get(Job, job_id, populate_existing=True)
    if job is None:
        raise NotFound(f"No job {job_id!r}.", param="job_id")
    return job
