"""What else changes when a job ends, in the same transaction: models, aliases, deployments, vector stores.

An evaluation decides the gate and registers the model; a deployment flips its alias, guarded by the alias's generation, so a
slower, older deployment never flips back; an ingest job brings its chunks in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects import postgresql
from sqlalchemy.orm import Session

from parampara import base_models
from parampara.db.models import Alias, Chunk, Deployment, Job, Model, Run, VectorStore, VectorStoreFile, new_id
from parampara.errors import InvalidData, WrongState
from parampara.execution.events import job_event
from parampara.settings import Settings

_BATCH = 200
_FLOAT_BYTES = 4
_NAME_DIGITS = (8, 12, 24)


def on_success(session: Session, job: Job, run: Run | None, *, settings: Settings, output: Path | None) -> None:
    """Called with job and run locked and the job's result set, before the run is settled. ``output``: the stage's, if unpublished.

    Raises:
        InvalidData: what an ingest stage wrote is not what was agreed.
    """
    if job.kind == "evaluate" and run is not None:
        _decide_gate(session, job, run, settings)
    elif job.kind == "deploy":
        tell_missed(session, job)
        _flip_alias(session, job)
    elif job.kind == "ingest":
        _take_chunks(session, job, output)


def on_end_without_success(session: Session, job: Job) -> None:
    """Called when a job failed or was cancelled."""
    if job.kind == "deploy":
        open_ones = update(Deployment).where(Deployment.job_id == job.id, Deployment.status.in_(("pending", "starting")))
        session.execute(open_ones.values(status="failed", error=job.error))
    elif job.kind == "ingest":
        status = "cancelled" if job.state == "cancelled" else "failed"
        error = {"code": "server_error", "message": (job.error or {}).get("message", "the ingest job ended")}
        session.execute(_files_in_progress(job).values(status=status, last_error=error if status == "failed" else None))


def on_retry(session: Session, job: Job) -> None:
    """Called when a failed or cancelled job is put back."""
    if job.kind == "ingest":
        ended = update(VectorStoreFile).where(VectorStoreFile.job_id == job.id, VectorStoreFile.status.in_(("failed", "cancelled")))
        session.execute(ended.values(status="in_progress", last_error=None))


def refuse_displacing(session: Session, alias: str, *, model: str | None, replace: bool) -> None:
    """The model server holds one model: a deployment that would end the service of another alias has to say so.

    ``model`` None: one that is still to be made.

    Raises:
        WrongState: another alias serves another model and ``replace`` is false; names both and the way out.
    """
    if replace:
        return
    query = select(Alias.name, Alias.model).where(Alias.name != alias, Alias.model.is_not(None)).order_by(Alias.name)
    for name, served in session.execute(query if model is None else query.where(Alias.model != model)):
        raise WrongState(
            f"Alias {name!r} serves {served!r}, and the model server holds one model: deploying under {alias!r} would end that. "
            f'To take it out of service say "replace": true (POST /v1/deployments; in a recipe stages.deploy.replace), '
            f"or deploy under {name!r}.",
            param="replace",
            code="model_server_taken",
        )


def open_deployment(session: Session, job: Job, *, model: str, artifact_id: str) -> Deployment:
    """The deployment row that a deploy job works on: its own open one, or a new one under the alias's next generation.

    Raises:
        WrongState: see :func:`refuse_displacing`.
    """
    params = job.spec["params"]
    refuse_displacing(session, params["alias"], model=model, replace=params.get("replace", False))
    query = select(Deployment).where(Deployment.job_id == job.id, Deployment.status.in_(("pending", "starting")))
    deployment = session.scalars(query.order_by(Deployment.generation.desc()).limit(1).with_for_update()).one_or_none()
    if deployment is None:
        alias = params["alias"]
        session.execute(postgresql.insert(Alias).values(name=alias).on_conflict_do_nothing())
        generation = session.execute(
            update(Alias).where(Alias.name == alias).values(generation=Alias.generation + 1).returning(Alias.generation)
        ).scalar_one()
        deployment = Deployment(id=new_id("dep_"), alias=alias, model=model, artifact_id=artifact_id, generation=generation, job_id=job.id)
        session.add(deployment)
    deployment.status = "starting"
    session.flush()
    return deployment


def tell_missed(session: Session, job: Job) -> str:
    """Write an event for every gate that the job's result missed; returns in words those that decided."""
    result = job.result or {}
    missed = [gate for gate in result.get("gates", []) if not gate["passed"]]
    for gate in missed:
        job_event(session, job, f"gate missed: {_shown(gate)}", level="warn", gate=gate)
    return "; ".join(_shown(gate) for gate in missed if gate["action"] == result["decision"])


def _shown(gate: dict[str, Any]) -> str:
    bounds = [f"{word} {gate[key]}" for key, word in (("min", "at least"), ("max", "at most")) if gate[key] is not None]
    return f"{gate['metric']} = {gate['value']}, wanted {' and '.join(bounds)}"


def model_id(run: Run, organization: str, *, digits: int) -> str:
    """``ft:<base>:<organization>:<suffix>:<first digits of the run's id>``."""
    base = base_models.short_name(run.recipe["base_model"])
    return f"ft:{base}:{organization}:{run.recipe['suffix']}:{run.id.removeprefix('run_')[:digits]}"


def _decide_gate(session: Session, job: Job, run: Run, settings: Settings) -> None:
    result = job.result or {}
    run.gate = result["decision"]
    missed = tell_missed(session, job)
    if run.gate == "fail":
        run.error = {"code": "gate_failed", "message": f"the evaluation missed {missed}", "param": "recipe.gates"}
        return
    artifact = session.scalars(select(Job.artifact_id).where(Job.run_id == run.id, Job.name == "quantize")).one_or_none()
    if artifact is None:
        raise InvalidData(f"Run {run.id} was evaluated but has no quantized model to register.")
    run.model = _register(session, run, settings, artifact)


def _register(session: Session, run: Run, settings: Settings, artifact: str) -> str:
    """Give the run's model the shortest name that no other model has; returns the name.

    Raises:
        InvalidData: every name was given to another artifact before.
    """
    for digits in _NAME_DIGITS:
        name = model_id(run, settings.organization, digits=digits)
        values = {"id": name, "base_model": run.recipe["base_model"], "artifact_id": artifact, "run_id": run.id}
        session.execute(postgresql.insert(Model).values(values).on_conflict_do_nothing())
        model = session.get_one(Model, name, populate_existing=True)
        if model.run_id == run.id and model.artifact_id == artifact:
            return name
    raise InvalidData(f"Every name for the model of run {run.id} belongs to another artifact already.")


def _flip_alias(session: Session, job: Job) -> None:
    session.execute(select(Alias.name).order_by(Alias.name).with_for_update())  # in one order: two flips may not wait for each other
    query = select(Deployment).where(Deployment.job_id == job.id, Deployment.status == "starting").with_for_update()
    deployment = session.scalars(query).one()
    deployment.url = (job.result or {})["url"]
    older = Alias.active_generation < deployment.generation
    flipped = session.execute(
        update(Alias)
        .where(Alias.name == deployment.alias, older)
        .values(active_generation=deployment.generation, model=deployment.model, url=deployment.url, updated_at=func.now())
        .returning(Alias.name)
    ).one_or_none()
    if flipped is None:
        deployment.status = "superseded"
        job_event(session, job, f"alias {deployment.alias} already points to a newer deployment", level="warn")
        return
    deployment.status, deployment.ready_at = "ready", func.now()
    same_alias = (Deployment.alias == deployment.alias, Deployment.generation < deployment.generation, Deployment.status == "ready")
    session.execute(update(Deployment).where(*same_alias).values(status="superseded"))
    job_event(session, job, f"alias {deployment.alias} now serves {deployment.model}", generation=deployment.generation)
    _end_displaced(session, job, deployment)


def _end_displaced(session: Session, job: Job, deployment: Deployment) -> None:
    """What other aliases served on this server it no longer holds; they point nowhere rather than at a model that never answers."""
    displaced = (Alias.url == deployment.url, Alias.name != deployment.alias, Alias.model != deployment.model)
    for name, model in session.execute(select(Alias.name, Alias.model).where(*displaced)).tuples().all():
        session.execute(update(Alias).where(Alias.name == name).values(model=None, url=None, updated_at=func.now()))
        session.execute(update(Deployment).where(Deployment.alias == name, Deployment.status == "ready").values(status="superseded"))
        job_event(session, job, f"alias {name} no longer serves {model}: the model server was given to {deployment.alias}", level="warn")


def _take_chunks(session: Session, job: Job, output: Path | None) -> None:
    if output is None or not (output / "chunks.jsonl").is_file():
        raise InvalidData("The ingest stage left no chunks.jsonl in its output.")
    store_id = job.spec["vector_store_id"]
    query = select(VectorStoreFile).where(VectorStoreFile.vector_store_id == store_id, VectorStoreFile.job_id == job.id)
    # a file that was detached meanwhile is not in here, and its chunks are dropped
    files = {row.file_id: row for row in session.scalars(query.with_for_update())}
    session.execute(delete(Chunk).where(Chunk.vector_store_id == store_id, Chunk.file_id.in_(files)))
    used = dict.fromkeys(files, 0)
    lines = _lines(output / "chunks.jsonl")
    while batch := list(islice(lines, _BATCH)):
        rows = [{**line, "vector_store_id": store_id} for line in batch if line["file_id"] in files]
        for row in rows:
            used[row["file_id"]] += len(row["text"].encode()) + _FLOAT_BYTES * len(row["embedding"])
        if rows:
            session.execute(insert(Chunk), rows)
    failed = (job.result or {}).get("failed", {})
    for file_id, row in files.items():
        row.usage_bytes = used[file_id]
        row.status = "failed" if file_id in failed else "completed"
        row.last_error = {"code": "invalid_file", "message": failed[file_id]} if file_id in failed else None
    session.execute(update(VectorStore).where(VectorStore.id == store_id).values(last_active_at=func.now()))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    keys = {"file_id", "filename", "position", "page", "text", "tokens", "embedding"}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            row = json.loads(line)
            if set(row) != keys:
                raise InvalidData(f"chunks.jsonl line {number}: keys {sorted(row)}, wanted {sorted(keys)}.")
            yield row


def _files_in_progress(job: Job) -> Any:
    return update(VectorStoreFile).where(VectorStoreFile.job_id == job.id, VectorStoreFile.status == "in_progress")
