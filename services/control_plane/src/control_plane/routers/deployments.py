"""``/v1/deployments``: serve a model under an alias."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from control_plane.dependencies import After, Limit, Ordering, SessionDep, SettingsDep, requires
from control_plane.services import deployments
from control_plane.transactions import after_commit
from parampara.schemas.api import DeploymentCreate, DeploymentObject, Page

router = APIRouter(prefix="/v1/deployments", tags=["Deployments"], dependencies=[requires("jobs")])


@router.post("", status_code=202, summary="Deploy a model")
def create_deployment(request: Request, session: SessionDep, settings: SettingsDep, body: DeploymentCreate) -> DeploymentObject:
    """Queues a deploy job. The alias moves only once the new model has answered a real request; until then the one before serves."""
    deployment = deployments.create(session, settings, body)
    after_commit(session, request.app.state.ringer.ring_soon)
    return deployment


@router.get("", summary="List deployments")
def list_deployments(
    session: SessionDep,
    alias: Annotated[str | None, Query(max_length=64, description="Only the history of this alias.")] = None,
    after: After = None,
    limit: Limit = 20,
    order: Ordering = "desc",
) -> Page[DeploymentObject]:
    return deployments.list_deployments(session, alias=alias, after=after, limit=limit, order=order)


@router.get("/{deployment_id}", summary="Get a deployment")
def get_deployment(session: SessionDep, deployment_id: str) -> DeploymentObject:
    return deployments.get(session, deployment_id)
