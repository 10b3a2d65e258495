"""Aliases: the movable names that clients pass as ``model``."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from parampara.db.models import Alias, VectorStore
from parampara.errors import NotFound
from parampara.schemas.api import AliasObject, AliasUpdate, Page, unix


def list_aliases(session: Session) -> Page[AliasObject]:
    data = [show(row) for row in session.scalars(select(Alias).order_by(Alias.name))]
    return Page(data=data, has_more=False, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


def get(session: Session, name: str) -> AliasObject:
    return show(get_row(session, name))


def update(session: Session, name: str, request: AliasUpdate) -> AliasObject:
    """Attach a vector store, or detach with null.

    Raises:
        NotFound: no such alias or vector store.
    """
    alias = get_row(session, name)
    if (store_id := request.vector_store_id) is not None:
        store = session.get(VectorStore, store_id)
        if store is None or store.deleted_at is not None:
            raise NotFound(f"No vector store {store_id!r}; make one with POST /v1/vector_stores.", param="vector_store_id")
    alias.vector_store_id = store_id
    session.flush()
    session.refresh(alias)
    return show(alias)


def get_row(session: Session, name: str) -> Alias:
    alias = session.get(Alias, name)
    if alias is None:
        raise NotFound(f"No alias {name!r}; one appears when a model is deployed under it (POST /v1/deployments).", param="alias")
    return alias


def show(row: Alias) -> AliasObject:
    return AliasObject(
        id=row.name, model=row.model, generation=row.active_generation, vector_store_id=row.vector_store_id, updated_at=unix(row.updated_at)
    )
