"""``/v1/models``: what a client may pass as ``model`` now. An alias moves; an immutable id always means the same weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

from gateway.directory import AliasEntry, ModelEntry
from gateway.web import may_read, services
from parampara.errors import NotFound

router = APIRouter(tags=["Models"], dependencies=[Depends(may_read)])


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parampara: dict[str, Any]
    """``kind`` (alias, model, embedding), and what the name stands for."""


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("/v1/models")
def list_models(request: Request) -> ModelList:
    """Aliases, the immutable ids they point at, and the embedding model."""
    return ModelList(data=list(_served(request).values()))


@router.get("/v1/models/{model:path}")
def get_model(model: Annotated[str, "an alias or an immutable id"], request: Request) -> ModelObject:
    """One model. A registered model that no server serves now is found too, with ``parampara.served`` false."""
    served = _served(request)
    if model in served:
        return served[model]
    entry = services(request).directory.snapshot.models.get(model)
    if entry is None:
        raise NotFound(f"The model {model[:100]!r} does not exist. GET /v1/models lists what does.", param="model", code="model_not_found")
    return _model(entry, services(request).settings.organization, served=False)


def _served(request: Request) -> dict[str, ModelObject]:
    parts = services(request)
    snapshot, owner = parts.directory.snapshot, parts.settings.organization
    aliases = [alias for alias in snapshot.aliases.values() if alias.model is not None]
    found = [_alias(alias, owner) for alias in aliases]
    behind = dict.fromkeys(alias.model for alias in aliases if alias.model in snapshot.models)
    found += [_model(snapshot.models[name], owner, served=True) for name in behind if name is not None]
    embedder = parts.settings.embedder
    found.append(
        ModelObject(id=embedder.model, created=0, owned_by=owner, parampara={"kind": "embedding", "dimensions": embedder.dimensions})
    )
    return {entry.id: entry for entry in found}


def _alias(alias: AliasEntry, owner: str) -> ModelObject:
    about = {"kind": "alias", "model": alias.model, "vector_store_id": alias.vector_store_id}
    return ModelObject(id=alias.name, created=alias.updated_at, owned_by=owner, parampara=about)


def _model(entry: ModelEntry, owner: str, *, served: bool) -> ModelObject:
    about = {"kind": "model", "base_model": entry.base_model, "artifact_id": entry.artifact_id, "served": served}
    return ModelObject(id=entry.id, created=entry.created_at, owned_by=owner, parampara=about)
