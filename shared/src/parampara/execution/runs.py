"""How the jobs of a run move each other: dependents become queued, a failure ends the rest, the run's state rolls up.

Locks are always taken in the order run, then job; every function here expects the run to be locked by the caller. The locks
are ``FOR NO KEY UPDATE``, so that an event row, whose foreign keys share-lock run and job, can be written beside them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from parampara.db.models import Job, Run
from parampara.execution.endings import end
from parampara.execution.events import announce, job_state, run_state

FINAL = ("succeeded", "failed", "cancelled")
HELD_BY_GATE = "held_by_gate"
FAILED_BY_GATE = "failed_by_gate"


def lock_run(session: Session, run_id: str | None) -> Run | None:
    """Lock and freshly read a run; None for a job outside any run."""
    if run_id is None:
        return None
    query = select(Run).where(Run.id == run_id).with_for_update(key_share=True).execution_options(populate_existing=True)
    return session.scalars(query).one_or_none()


def jobs_of(session: Session, run: Run) -> list[Job]:
    """The run's jobs in order, freshly read and locked."""
    session.flush()
    query = select(Job).where(Job.run_id == run.id).order_by(Job.position).with_for_update(key_share=True)
    return list(session.scalars(query.execution_options(populate_existing=True)))


def settle(session: Session, run: Run | None) -> None:
    """Bring a run in line with its jobs, after any of them has changed."""
    if run is None:
        return
    jobs = jobs_of(session, run)
    _close_gate(session, run, jobs)
    if broken := _broken(jobs):
        _end_the_rest(session, jobs, because=broken)
    else:
        _advance(session, jobs)
    _roll_up(session, run, jobs, broken)


def _broken(jobs: list[Job]) -> Job | None:
    """The job that keeps the run from succeeding, a failed one first."""
    failed = [job for job in jobs if job.state == "failed"]
    cancelled = [job for job in jobs if job.state == "cancelled" and not held(job)]
    being_cancelled = [job for job in jobs if job.state == "running" and job.cancel_requested]
    return next(iter(failed + cancelled + being_cancelled), None)


def held(job: Job) -> bool:
    return (job.error or {}).get("code") in (HELD_BY_GATE, FAILED_BY_GATE)


def _close_gate(session: Session, run: Run, jobs: list[Job]) -> None:
    """After an evaluation that does not promote, nothing is deployed."""
    if run.gate not in ("hold", "fail"):
        return
    code = HELD_BY_GATE if run.gate == "hold" else FAILED_BY_GATE
    for job in jobs:
        if job.kind == "deploy" and job.state in ("waiting", "queued"):
            end(session, job, "cancelled", {"code": code, "message": f"the gates of the recipe say {run.gate}"})


def _end_the_rest(session: Session, jobs: list[Job], *, because: Job) -> None:
    for job in jobs:
        if job.state in ("waiting", "queued"):
            code, verb = ("upstream_failed", "failed") if because.state == "failed" else ("run_cancelled", "was cancelled")
            end(session, job, "cancelled", {"code": code, "message": f"{because.name} {verb}"})
        elif job.state == "running":
            job.cancel_requested = True


def _advance(session: Session, jobs: list[Job]) -> None:
    done = {job.id for job in jobs if job.state == "succeeded"}
    for job in jobs:
        if job.state == "waiting" and done.issuperset(job.depends_on):
            job.state = "queued"
            job_state(session, job, f"{job.name} queued")
            announce(session, job)


def _roll_up(session: Session, run: Run, jobs: list[Job], broken: Job | None) -> None:
    state, error = _state_of(run, jobs, broken)
    if state == run.state:
        return
    run.state, run.error = state, error
    if state == "running" and run.started_at is None:
        run.started_at = func.now()
    run.finished_at = func.now() if state in FINAL else None
    message = f"run {state}" + (f": {error['message']}" if error else "")
    run_state(session, run, message, level="error" if state == "failed" else "info")


def _state_of(run: Run, jobs: list[Job], broken: Job | None) -> tuple[str, dict[str, Any] | None]:
    states = {job.state for job in jobs}
    if states & {"running", "queued", "waiting"}:
        return ("queued" if states <= {"queued", "waiting"} else "running"), None
    if run.gate == "fail":
        return "failed", run.error or {"code": "gate_failed", "message": "a gate of the recipe failed the run"}
    if broken is None:
        return "succeeded", None
    if broken.state == "failed":
        error = broken.error or {}
        return "failed", {**error, "message": f"{broken.name}: {error.get('message', 'failed')}", "job_id": broken.id}
    return "cancelled", None
