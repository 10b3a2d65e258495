"""Vector stores as rows. Every function works inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Select, delete, func, select, tuple_
from sqlalchemy.orm import Session

from gateway.vector_stores.schemas import FileCounts, StoreObject
from parampara.db.models import Alias, Chunk, Job, VectorStore, VectorStoreFile, new_id
from parampara.errors import InvalidRequest, NotFound, WrongState
from parampara.execution.queue import request_cancel

Order = Literal["asc", "desc"]
MAX_STORES = 1000
_LIVE = ("waiting", "queued", "running")


def create(session: Session, *, name: str, embedding_model: str, metadata: dict[str, str] | None) -> VectorStore:
    """A new, empty store.

    Raises:
        WrongState: there are too many.
    """
    if session.scalar(select(func.count()).select_from(VectorStore).where(VectorStore.deleted_at.is_(None))) >= MAX_STORES:  # type: ignore[operator]
        raise WrongState(f"There are {MAX_STORES} vector stores, which is the limit; delete one first.")
    store = VectorStore(id=new_id("vs_"), name=name, embedding_model=embedding_model, extra=metadata or {})
    session.add(store)
    session.flush()
    return store


def get(session: Session, store_id: str, *, lock: bool = False) -> VectorStore:
    """Raises NotFound for a store that does not exist or was deleted."""
    query = select(VectorStore).where(VectorStore.id == store_id, VectorStore.deleted_at.is_(None))
    store = session.scalar(query.with_for_update() if lock else query)
    if store is None:
        raise NotFound(f"No vector store {store_id[:100]!r}.", param="vector_store_id", code="vector_store_not_found")
    return store


def listed(session: Session, *, after: str | None, before: str | None, limit: int, order: Order) -> tuple[Sequence[VectorStore], bool]:
    """One page and whether there is more."""
    query = select(VectorStore).where(VectorStore.deleted_at.is_(None))
    return page(session, query, VectorStore.created_at, VectorStore.id, after=after, before=before, limit=limit, order=order)


def remove(session: Session, store_id: str) -> None:
    """Delete a store with its chunks, and stop what is being ingested into it.

    Raises:
        NotFound: no such store.
        WrongState: an alias answers with it.
    """
    store = get(session, store_id, lock=True)
    used_by = session.scalars(select(Alias.name).where(Alias.vector_store_id == store.id).order_by(Alias.name)).all()
    if used_by:
        raise WrongState(
            f"The vector store {store.id} is attached to the alias {', '.join(used_by)}; detach it first: "
            f'POST /v1/aliases/{used_by[0]} {{"vector_store_id": null}}.',
            param="vector_store_id",
        )
    running = select(Job.id).join(VectorStoreFile, VectorStoreFile.job_id == Job.id)
    for job_id in session.scalars(running.where(VectorStoreFile.vector_store_id == store.id, Job.state.in_(_LIVE)).distinct()).all():
        request_cancel(session, job_id)
    session.execute(delete(Chunk).where(Chunk.vector_store_id == store.id))
    session.execute(delete(VectorStoreFile).where(VectorStoreFile.vector_store_id == store.id))
    store.deleted_at = func.now()


def shown(session: Session, stores: Sequence[VectorStore]) -> list[StoreObject]:
    """Stores in wire form, their files counted in one query."""
    counts: dict[str, FileCounts] = {store.id: FileCounts() for store in stores}
    usage: dict[str, int] = dict.fromkeys(counts, 0)
    columns = (VectorStoreFile.vector_store_id, VectorStoreFile.status)
    rows = session.execute(
        select(*columns, func.count(), func.sum(VectorStoreFile.usage_bytes)).where(columns[0].in_(counts)).group_by(*columns)
    )
    for store_id, status, number, used in rows:
        setattr(counts[store_id], status, number)
        counts[store_id].total += number
        usage[store_id] += int(used)
    return [_shown(store, counts[store.id], usage[store.id]) for store in stores]


def _shown(store: VectorStore, counts: FileCounts, usage: int) -> StoreObject:
    return StoreObject(
        id=store.id,
        created_at=int(store.created_at.timestamp()),
        name=store.name,
        usage_bytes=usage,
        file_counts=counts,
        status="in_progress" if counts.in_progress else "completed",
        last_active_at=int(store.last_active_at.timestamp()),
        metadata=store.extra,
        parampara={"embedding_model": store.embedding_model},
    )


def page(
    session: Session, query: Select[Any], created: Any, row_id: Any, *, after: str | None, before: str | None, limit: int, order: Order
) -> tuple[Sequence[Any], bool]:
    """One page of ``query``, ordered by creation, walked with ``after=<last id>`` or back with ``before=<first id>``.

    Raises:
        InvalidRequest: the cursor is not in the list, or both cursors were given.
    """
    if after and before:
        raise InvalidRequest("Give after or before, not both.", param="before")
    newest_first = (order == "desc") != bool(before)
    if cursor := after or before:
        at = session.execute(query.with_only_columns(created, row_id).where(row_id == cursor)).one_or_none()
        if at is None:
            raise InvalidRequest(f"No object {cursor[:100]!r} in this list.", param="after" if after else "before")
        place = tuple_(created, row_id)
        query = query.where(place < tuple_(*at) if newest_first else place > tuple_(*at))
    ordering = (created.desc(), row_id.desc()) if newest_first else (created, row_id)
    rows = list(session.scalars(query.order_by(*ordering).limit(limit + 1)))
    found, more = rows[:limit], len(rows) > limit
    return (found[::-1] if before else found), more
