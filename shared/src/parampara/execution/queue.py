"""What other parts ask of the queue: create a run, enqueue a job, cancel, retry. Nothing here commits.

Every function works inside the caller's transaction and writes its doorbells to the outbox; call :func:`ring` after commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from parampara import base_models, files, judges
from parampara.db.models import Job, Run, new_id
from parampara.errors import InvalidRequest, NotFound, WrongState
from parampara.execution import hooks
from parampara.execution.doorbell import ring
from parampara.execution.endings import end
from parampara.execution.events import announce, job_state, run_state
from parampara.execution.runs import FINAL, held, jobs_of, lock_run, settle
from parampara.plan import DATASETS, QUEUES, PlannedJob, check_datasets, plan_run
from parampara.schemas.recipe import Recipe
from parampara.schemas.stages import Kind
from parampara.settings import Settings

__all__ = ["create_run", "enqueue_job", "request_cancel", "retry_job", "retry_run", "ring"]


def create_run(
    session: Session,
    *,
    settings: Settings,
    recipe: Recipe,
    datasets: Mapping[str, Any],
    name: str | None = None,
    extra: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
    request_sha256: str | None = None,
    reuse: bool = True,
) -> Run:
    """Write a run and all its jobs; the first is queued. With ``reuse`` a job whose product exists already takes that.

    The same ``idempotency_key`` with the same ``request_sha256`` returns the run that it made before.

    Raises:
        InvalidRequest: unknown base model, datasets that :func:`parampara.plan.check_datasets` refuses, or the idempotency key came with
            another request.
        NotFound: a file id that does not exist; ``param`` is its place, e.g. ``datasets.qa``.
    """
    base_models.resolve(settings, recipe.base_model)
    judges.endpoint(settings, recipe.stages.evaluate)
    checked = check_datasets(datasets, recipe)
    for key in DATASETS:
        files.get_files(session, checked[key], param=f"datasets.{key}", lock=True)
    values = {
        "id": new_id("run_"),
        "name": name or recipe.name,
        "recipe": recipe.model_dump(mode="json"),
        "datasets": checked,
        "extra": dict(extra or {}),
        "idempotency_key": idempotency_key,
        "request_sha256": request_sha256,
    }
    inserted = session.execute(
        insert(Run).values(values).on_conflict_do_nothing(index_elements=[Run.idempotency_key]).returning(Run.id)
    ).scalar_one_or_none()
    if inserted is None:
        return _same_request(session, str(idempotency_key), request_sha256)
    run = session.get_one(Run, inserted)
    run_state(session, run, "run queued")
    _add_jobs(session, run, plan_run(recipe, checked), reuse=reuse)
    session.flush()
    return run


def enqueue_job(session: Session, *, kind: Kind, spec: Mapping[str, Any], name: str | None = None) -> Job:
    """Queue a job outside any run: ``plan.ingest_spec(...)`` or ``plan.deploy_spec(...)``."""
    job = Job(id=new_id("job_"), name=name or kind, kind=kind, queue=QUEUES[kind], state="queued", spec=dict(spec))
    session.add(job)
    session.flush()
    job_state(session, job, f"{job.name} queued")
    announce(session, job)
    session.flush()
    return job


def request_cancel(session: Session, run_or_job_id: str) -> None:
    """Cancel a run or one job: at once where no worker holds it, else its worker stops the stage within seconds.

    Raises:
        NotFound: no such run or job.
        WrongState: it is already over.
    """
    if run_or_job_id.startswith("run_"):
        run = _run(session, run_or_job_id)
        _refuse_final("run", run.id, run.state, "cancel")
        jobs = [job for job in jobs_of(session, run) if job.state not in FINAL]
    else:
        run, job = _job(session, run_or_job_id)
        _refuse_final("job", job.id, job.state, "cancel")
        jobs = [job]
    for job in jobs:
        if job.state == "running":
            job.cancel_requested = True
            job_state(session, job, f"{job.name}: cancel requested")
        else:
            end(session, job, "cancelled", {"code": "cancelled", "message": "cancelled on request"})
    session.flush()
    settle(session, run)


def retry_job(session: Session, job_id: str) -> Job:
    """Put a failed or cancelled job, and the jobs that were cancelled because of it, back; earlier attempts stay.

    Raises:
        NotFound: no such job.
        WrongState: it neither failed nor was cancelled, a gate holds it, a job it depends on has not succeeded, or the run is
            still being cancelled.
    """
    run, job = _job(session, job_id)
    _check_retry(job)
    if run is None:
        _put_back(session, job, "queued")
        announce(session, job)
        session.flush()
        return job
    jobs = {other.id: other for other in jobs_of(session, run)}
    _refuse_while_cancelling(run, list(jobs.values()))
    for needed in (jobs[job_id] for job_id in job.depends_on):
        if needed.state != "succeeded":
            raise WrongState(
                f"Job {job.id} ({job.name}) needs {needed.name}, which is {needed.state}: retry that, or the run.", param="job_id"
            )
    again = {job.id}
    for other in jobs.values():  # in order, so that a chain follows
        if again & set(other.depends_on) and other.state == "cancelled" and not held(other):
            again.add(other.id)
    _wake(session, run, [jobs[other] for other in again])
    return job


def retry_run(session: Session, run_id: str) -> Run:
    """Put every failed or cancelled job of a run back; succeeded ones keep their products.

    Raises:
        NotFound: no such run.
        WrongState: nothing in it failed or was cancelled, its gates failed it, or it is still being cancelled.
    """
    run = _run(session, run_id)
    if run.gate == "fail":
        raise WrongState(
            f"Run {run.id} was failed by a gate: equal inputs give an equal result. Change the recipe and start a new run.", param="run_id"
        )
    jobs = jobs_of(session, run)
    _refuse_while_cancelling(run, jobs)
    again = [job for job in jobs if job.state in ("failed", "cancelled") and not held(job)]
    if not again:
        raise WrongState(f"Run {run.id} is {run.state}: there is no failed or cancelled job to retry.", param="run_id")
    _wake(session, run, again)
    return run


def _add_jobs(session: Session, run: Run, planned: list[PlannedJob], *, reuse: bool) -> None:
    ids = {item.name: new_id("job_") for item in planned}
    for position, item in enumerate(planned):
        job = Job(
            id=ids[item.name],
            run_id=run.id,
            name=item.name,
            kind=item.kind,
            queue=QUEUES[item.kind],
            position=position,
            state="waiting" if item.depends_on else "queued",
            depends_on=[ids[name] for name in item.depends_on],
            spec=item.spec(reuse=reuse),
        )
        session.add(job)
        session.flush()
        if job.state == "queued":
            job_state(session, job, f"{job.name} queued")
            announce(session, job)


def _same_request(session: Session, idempotency_key: str, request_sha256: str | None) -> Run:
    run = session.scalars(select(Run).where(Run.idempotency_key == idempotency_key)).one()
    if run.request_sha256 != request_sha256:
        raise InvalidRequest(
            f"Idempotency key {idempotency_key!r} was used for another request (run {run.id}): use a new key.",
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return run


def _check_retry(job: Job) -> None:
    if job.state not in ("failed", "cancelled"):
        raise WrongState(f"Job {job.id} ({job.name}) is {job.state}: only a failed or cancelled job can be retried.", param="job_id")
    if held(job):
        raise WrongState(
            f"Job {job.id} ({job.name}) was stopped by a gate: deploy the model by hand with POST /v1/deployments.", param="job_id"
        )


def _refuse_while_cancelling(run: Run, jobs: list[Job]) -> None:
    """Whatever were put back now would be cancelled again with the job that is stopping."""
    for job in jobs:
        if job.state == "running" and job.cancel_requested:
            raise WrongState(f"Run {run.id} is still being cancelled ({job.name} is stopping); retry once it is cancelled.", param="run_id")


def _wake(session: Session, run: Run, jobs: list[Job]) -> None:
    for job in jobs:
        _put_back(session, job, "waiting")
    run.error, run.finished_at = None, None
    session.flush()
    settle(session, run)


def _put_back(session: Session, job: Job, state: str) -> None:
    job.state, job.error, job.result = state, None, None
    job.crashes, job.cancel_requested, job.progress = 0, False, {}
    job.owner = job.lease_until = job.not_before = job.started_at = job.finished_at = None
    hooks.on_retry(session, job)
    job_state(session, job, f"{job.name} {state} again (retry)")


def _run(session: Session, run_id: str) -> Run:
    run = lock_run(session, run_id)
    if run is None:
        raise NotFound(f"No run {run_id!r}.", param="run_id")
    return run


def _job(session: Session, job_id: str) -> tuple[Run | None, Job]:
    """Lock a job, its run first."""
    found = session.execute(select(Job.run_id).where(Job.id == job_id)).one_or_none()
    if found is None:
        raise NotFound(f"No job {job_id!r}.", param="job_id")
    run = lock_run(session, found[0])
    query = select(Job).where(Job.id == job_id).with_for_update(key_share=True).execution_options(populate_existing=True)
    return run, session.scalars(query).one()


def _refuse_final(noun: str, object_id: str, state: str, verb: str) -> None:
    if state in FINAL:
        raise WrongState(f"The {noun} {object_id} is already {state}: there is nothing to {verb}.", param=f"{noun}_id")
