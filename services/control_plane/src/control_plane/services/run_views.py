"""Runs as clients see them: state, share done, time left, gates and artifacts, put together from the run's jobs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from control_plane.services import job_views
from parampara.db.models import Artifact, Job, Run
from parampara.schemas.api import RunArtifact, RunObject, RunSummary, unix, unix_or_none

_HISTORY = 20


def summary(run: Run) -> RunSummary:
    return RunSummary.model_validate(_fields(run))


def detail(session: Session, run: Run) -> RunObject:
    """A run with its jobs in the order in which they run."""
    jobs = list(session.scalars(select(Job).where(Job.run_id == run.id).order_by(Job.position, Job.created_at, Job.id)))
    running = next((job for job in jobs if job.state == "running"), None)
    judged = [job.result for job in jobs if job.kind in ("evaluate", "deploy") and job.result]
    return RunObject.model_validate(
        {
            **_fields(run),
            "datasets": run.datasets,
            "recipe": run.recipe,
            "stage": running.name if running else None,
            "progress": share_done(jobs),
            "eta_seconds": _time_left(session, run, jobs),
            "jobs": [job_views.show(job) for job in jobs],
            "gates": [gate for result in judged for gate in result.get("gates", [])],
            "artifacts": _artifacts(session, jobs),
        }
    )


def share_done(jobs: list[Job]) -> float:
    """Share of the jobs that have ended, a running one counted by its steps."""
    if not jobs:
        return 0.0
    return min(1.0, sum(_share(job) for job in jobs) / len(jobs))


def _share(job: Job) -> float:
    if job.state in ("succeeded", "cancelled"):
        return 1.0
    step, total = job.progress.get("step"), job.progress.get("total")
    return min(1.0, step / total) if job.state == "running" and isinstance(step, int) and isinstance(total, int) and total > 0 else 0.0


def _time_left(session: Session, run: Run, jobs: list[Job]) -> float | None:
    """The running job's own estimate, plus for each job still to come the median of earlier runs of this recipe; None when
    either is not known."""
    if run.state not in ("queued", "running"):
        return None
    usual = _usual_seconds(session, run)
    seconds = 0.0
    for job in jobs:
        left = job.progress.get("eta_seconds") if job.state == "running" else usual.get(job.name)
        if job.state in ("running", "queued", "waiting"):
            if left is None:
                return None
            seconds += left
    return seconds


def _usual_seconds(session: Session, run: Run) -> dict[str, float]:
    took = func.extract("epoch", Job.finished_at - Job.started_at)
    recent = (
        select(Job.name, took.label("seconds"), func.row_number().over(partition_by=Job.name, order_by=Job.finished_at.desc()).label("age"))
        .join(Run, Run.id == Job.run_id)
        .where(Run.recipe["name"].astext == run.recipe.get("name"), Job.state == "succeeded", Job.reused_from.is_(None))
        .subquery()
    )
    median = func.percentile_cont(0.5).within_group(recent.c.seconds)
    rows = session.execute(select(recent.c.name, median).where(recent.c.age <= _HISTORY).group_by(recent.c.name))
    return {name: float(seconds) for name, seconds in rows if seconds is not None}


def _artifacts(session: Session, jobs: list[Job]) -> list[RunArtifact]:
    made = [job for job in jobs if job.artifact_id is not None]
    rows = {row.id: row for row in session.scalars(select(Artifact).where(Artifact.id.in_([job.artifact_id for job in made])))}
    found = [(job, rows[job.artifact_id]) for job in made if job.artifact_id in rows]
    return [
        RunArtifact.model_validate(
            {"id": row.id, "kind": row.kind, "bytes": row.bytes, "job": job.name, "reused": job.reused_from is not None}
        )
        for job, row in found
    ]


def _fields(run: Run) -> dict[str, Any]:
    deploy = (run.recipe.get("stages") or {}).get("deploy") or {}
    return {
        "id": run.id,
        "name": run.name,
        "status": run.state,
        "gate": run.gate,
        "model": run.model,
        "alias": deploy.get("alias"),
        "error": run.error,
        "metadata": run.extra,
        "created_at": unix(run.created_at),
        "started_at": unix_or_none(run.started_at),
        "finished_at": unix_or_none(run.finished_at),
    }
