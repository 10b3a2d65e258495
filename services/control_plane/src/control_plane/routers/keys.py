"""``/v1/api_keys``: administrators only."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from control_plane.dependencies import After, Limit, Ordering, SessionDep, requires
from control_plane.services import keys
from parampara.schemas.api import ApiKeyCreate, ApiKeyCreated, ApiKeyObject, Page

router = APIRouter(prefix="/v1/api_keys", tags=["API keys"], dependencies=[requires("admin")])


def _pepper(request: Request) -> bytes:
    return request.app.state.pepper


@router.post("", status_code=201, summary="Make a key")
def create_key(session: SessionDep, pepper: Annotated[bytes, Depends(_pepper)], body: ApiKeyCreate) -> ApiKeyCreated:
    """The key is shown in this answer only; the database holds its hash. Scopes: `admin` (everything), `jobs` (files, runs,
    jobs, artifacts, deployments), `chat` (the gateway's model routes)."""
    return keys.create(session, pepper, body)


@router.get("", summary="List keys")
def list_keys(session: SessionDep, after: After = None, limit: Limit = 100, order: Ordering = "desc") -> Page[ApiKeyObject]:
    """Revoked keys stay in the list."""
    return keys.list_keys(session, after=after, limit=limit, order=order)


@router.get("/{key_id}", summary="Get a key")
def get_key(session: SessionDep, key_id: str) -> ApiKeyObject:
    return keys.get(session, key_id)


@router.delete("/{key_id}", summary="Revoke a key")
def revoke_key(session: SessionDep, key_id: str) -> ApiKeyObject:
    """Takes effect at once. The last administrator's key can not be revoked."""
    return keys.revoke(session, key_id)
