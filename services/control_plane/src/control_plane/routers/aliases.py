"""``/v1/aliases``: movable model names, the knowledge base attached to each, and the way back."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from control_plane.dependencies import SessionDep, requires
from control_plane.services import aliases, deployments
from control_plane.transactions import after_commit
from parampara.schemas.api import AliasObject, AliasUpdate, DeploymentObject, Page

router = APIRouter(prefix="/v1/aliases", tags=["Aliases"], dependencies=[requires("jobs")])


@router.get("", summary="List aliases")
def list_aliases(session: SessionDep) -> Page[AliasObject]:
    return aliases.list_aliases(session)


@router.get("/{name}", summary="Get an alias")
def get_alias(session: SessionDep, name: str) -> AliasObject:
    return aliases.get(session, name)


@router.post("/{name}", summary="Attach a knowledge base")
def update_alias(session: SessionDep, name: str, body: AliasUpdate) -> AliasObject:
    """With a vector store attached, a plain chat with this alias is answered from it, with citations. `null` detaches it."""
    return aliases.update(session, name, body)


@router.post("/{name}/rollback", status_code=202, summary="Go back to the model before")
def rollback(
    request: Request,
    session: SessionDep,
    name: str,
    replace: Annotated[bool, Query(description="Take the model server from other aliases that serve another model.")] = False,
) -> DeploymentObject:
    """Deploys what the alias served before its present model, the same way as any deployment."""
    deployment = deployments.rollback(session, name, replace=replace)
    after_commit(session, request.app.state.ringer.ring_soon)
    return deployment
