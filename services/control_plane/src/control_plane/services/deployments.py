"""Deployments: which model an alias serves, and the way back to the one before."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from control_plane.services import aliases, artifacts
from control_plane.services.paging import page
from parampara.base_models import short_name
from parampara.db.models import Alias, Artifact, Deployment, Job, Model, Run
from parampara.errors import InvalidRequest, NotFound, WrongState
from parampara.execution.hooks import open_deployment
from parampara.execution.queue import enqueue_job
from parampara.plan import deploy_spec
from parampara.schemas.api import DeploymentCreate, DeploymentObject, LiveObject, Order, Page, unix, unix_or_none
from parampara.schemas.stages import DeployParams
from parampara.settings import Settings

DEPLOYABLE = ("merged_model", "quantized_model")
_DIGEST_DIGITS = 12


def create(session: Session, settings: Settings, request: DeploymentCreate) -> DeploymentObject:
    """Queue a deploy job. The alias moves only when the model has answered; until then the one before goes on serving.

    What ``params`` leaves open is taken from the recipe that made the model, as its own run would have deployed it.

    Raises:
        NotFound: no such model or artifact.
        InvalidRequest: the artifact is not a complete model, or ``params.alias`` says something else than ``alias``.
        WrongState: another alias serves another model on the model server, and the request does not say ``replace``.
    """
    params = request.params or DeployParams()
    if "alias" in params.model_fields_set and params.alias != request.alias:
        raise InvalidRequest(
            f"params.alias is {params.alias!r} but alias is {request.alias!r}; leave params.alias out.", param="params.alias"
        )
    model = _model(session, request.model) if request.model is not None else _registered(session, settings, str(request.artifact_id))
    given = params.model_dump(exclude_unset=True)
    told = {"alias": request.alias, "replace": request.replace or params.replace}
    return _enqueue(session, model, DeployParams.model_validate({**_recipe_params(session, model), **given, **told}))


def rollback(session: Session, name: str, *, replace: bool) -> DeploymentObject:
    """Deploy again what an alias served before its present model, with the parameters it had; or its last one, if it serves none now.

    Raises:
        NotFound: no such alias.
        WrongState: it never served anything else, or another alias would lose its model and ``replace`` is false.
    """
    alias = aliases.get_row(session, name)
    served = select(Deployment).where(
        Deployment.alias == name, Deployment.ready_at.is_not(None), Deployment.generation <= alias.active_generation
    )
    before = session.scalars(
        served.where(Deployment.model.is_distinct_from(alias.model)).order_by(Deployment.generation.desc()).limit(1)
    ).one_or_none()
    if before is None:
        raise WrongState(f"Alias {name!r} never served another model than {alias.model!r}: there is nothing to go back to.", param="alias")
    job = session.get(Job, before.job_id) if before.job_id else None
    params = DeployParams.model_validate(job.spec["params"]) if job else DeployParams(alias=name)
    return _enqueue(session, _model(session, before.model), params.model_copy(update={"replace": replace}))


def list_deployments(session: Session, *, alias: str | None, after: str | None, limit: int, order: Order) -> Page[DeploymentObject]:
    active = _active(session)
    query = select(Deployment) if alias is None else select(Deployment).where(Deployment.alias == alias)
    key, created = Deployment.id, Deployment.created_at
    return page(
        session, query, key=key, created=created, after=after, limit=limit, order=order, show=lambda row: show(session, row, active)
    )


def get(session: Session, deployment_id: str) -> DeploymentObject:
    row = session.get(Deployment, deployment_id)
    if row is None:
        raise NotFound(f"No deployment {deployment_id!r}.", param="deployment_id")
    return show(session, row, _active(session))


def show(session: Session, row: Deployment, active: dict[str, int]) -> DeploymentObject:
    return DeploymentObject(
        id=row.id,
        alias=row.alias,
        model=row.model,
        artifact_id=row.artifact_id,
        generation=row.generation,
        status=row.status,
        active=row.status == "ready" and active.get(row.alias) == row.generation,
        live=_live(session, row),
        job_id=row.job_id,
        url=row.url,
        error=row.error,
        created_at=unix(row.created_at),
        ready_at=unix_or_none(row.ready_at),
    )


def _live(session: Session, row: Deployment) -> LiveObject | None:
    job = session.get(Job, row.job_id) if row.job_id else None
    result = (job.result if job else None) or {}
    if result.get("generation") != row.generation or "gates" not in result:
        return None  # not measured yet, or by a version that did not
    return LiveObject.model_validate({key: result.get(key) for key in LiveObject.model_fields})


def _enqueue(session: Session, model: Model, params: DeployParams) -> DeploymentObject:
    job = enqueue_job(session, kind="deploy", spec=deploy_spec(model=model.id, artifact_id=model.artifact_id, params=params))
    row = open_deployment(session, job, model=model.id, artifact_id=model.artifact_id)
    row.status = "pending"  # the worker that claims the job finds this row and starts it
    session.flush()
    session.refresh(row)
    return show(session, row, _active(session))


def _recipe_params(session: Session, model: Model) -> dict[str, Any]:
    """The stage ``deploy`` of the recipe that made ``model``; nothing where that is not known."""
    run = session.get(Run, model.run_id) if model.run_id else None
    return dict((run.recipe["stages"].get("deploy") if run else None) or {})


def _model(session: Session, name: str) -> Model:
    model = session.get(Model, name)
    if model is None:
        raise NotFound(
            f"No model {name!r}. Take the `model` of a run that was evaluated, or deploy by artifact_id.",
            param="model",
            code="model_not_found",
        )
    return model


def _registered(session: Session, settings: Settings, artifact_id: str) -> Model:
    """The model that stands for an artifact; one that a gate held back has none yet and is registered here."""
    artifact = artifacts.get_row(session, artifact_id)
    if artifact.kind not in DEPLOYABLE:
        raise InvalidRequest(
            f"Artifact {artifact_id} is of kind {artifact.kind!r}; a model server needs one of {', '.join(DEPLOYABLE)}.",
            param="artifact_id",
        )
    known = session.scalars(select(Model).where(Model.artifact_id == artifact_id).order_by(Model.created_at.desc()).limit(1)).one_or_none()
    if known is not None:
        return known
    run = _maker(session, artifact)
    base, digits = run.recipe["base_model"], artifact_id.partition(":")[2][:_DIGEST_DIGITS]
    name = f"ft:{short_name(base)}:{settings.organization}:{run.recipe['suffix']}:{digits}"
    session.execute(insert(Model).values(id=name, base_model=base, artifact_id=artifact_id, run_id=run.id).on_conflict_do_nothing())
    return _model(session, name)


def _maker(session: Session, artifact: Artifact) -> Run:
    job = session.get(Job, artifact.job_id) if artifact.job_id else None
    run = session.get(Run, job.run_id) if job and job.run_id else None
    if run is None:
        raise InvalidRequest(
            f"Artifact {artifact.id} was made by no run that is known here, so its base model is not known.", param="artifact_id"
        )
    return run


def _active(session: Session) -> dict[str, int]:
    return dict(session.execute(select(Alias.name, Alias.active_generation)).tuples().all())
