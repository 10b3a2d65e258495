"""API keys: the first administrator's, and those that administrators make and revoke."""

from __future__ import annotations

import structlog
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session, sessionmaker

from control_plane.services.paging import page
from parampara.db.models import ApiKey, new_id
from parampara.db.session import transaction
from parampara.errors import NotFound, WrongState
from parampara.keys import hash_key, hint, new_key, well_formed, write_secret
from parampara.schemas.api import ApiKeyCreate, ApiKeyCreated, ApiKeyObject, Order, Page, Scope, unix, unix_or_none
from parampara.settings import Settings

_ADMIN_LOCK = 0x6B657973  # "keys": one bootstrap or revocation at a time

log = structlog.get_logger(__name__)


def bootstrap_admin(sessions: sessionmaker[Session], settings: Settings, pepper: bytes) -> None:
    """Make sure that an administrator's key exists: ``<home>/api-key`` (0600), written before its row so that a crash in
    between leaves a key that the next start adopts. The key itself is never logged.

    Raises:
        WrongState: the file holds something that is not a key.
    """
    path = settings.home.resolve() / "api-key"
    with transaction(sessions) as session:
        session.execute(select(func.pg_advisory_xact_lock(_ADMIN_LOCK)))
        if not path.exists():
            if _active_admins(session):
                return
            write_secret(path, new_key())
            log.info("administrator key written", path=str(path))
        key = path.read_text(encoding="ascii").strip()
        if not well_formed(key):
            raise WrongState(f"{path} does not hold an API key. Remove the file to get a new administrator key.")
        row = ApiKey(id=new_id("key_"), name="admin (first start)", hint=hint(key), hash=hash_key(pepper, key), scopes=["admin"])
        values = {"id": row.id, "name": row.name, "hint": row.hint, "hash": row.hash, "scopes": row.scopes}
        session.execute(insert(ApiKey).values(values).on_conflict_do_nothing(index_elements=[ApiKey.hash]))


def create(session: Session, pepper: bytes, request: ApiKeyCreate) -> ApiKeyCreated:
    """Make a key; the answer is the only place where it is ever shown."""
    key = new_key()
    row = ApiKey(id=new_id("key_"), name=request.name, hint=hint(key), hash=hash_key(pepper, key), scopes=sorted(set(request.scopes)))
    session.add(row)
    session.flush()
    session.refresh(row)
    return ApiKeyCreated(key=key, **show(row).model_dump())


def list_keys(session: Session, *, after: str | None, limit: int, order: Order) -> Page[ApiKeyObject]:
    return page(session, select(ApiKey), key=ApiKey.id, created=ApiKey.created_at, after=after, limit=limit, order=order, show=show)


def get(session: Session, key_id: str) -> ApiKeyObject:
    return show(_row(session, key_id))


def revoke(session: Session, key_id: str) -> ApiKeyObject:
    """Revoke a key at once; revoking it again changes nothing.

    Raises:
        NotFound: no such key.
        WrongState: it is the last key with the scope ``admin``.
    """
    session.execute(select(func.pg_advisory_xact_lock(_ADMIN_LOCK)))
    row = _row(session, key_id)
    if row.revoked_at is not None:
        return show(row)
    if _active_admins(session) == [row.id]:
        raise WrongState(f"{key_id} is the last key with the scope 'admin'. Make another one first, then revoke this.", param="key_id")
    row.revoked_at = session.scalar(select(func.now()))
    return show(row)


def show(row: ApiKey) -> ApiKeyObject:
    scopes: list[Scope] = [scope for scope in ("admin", "jobs", "chat") if scope in row.scopes]
    return ApiKeyObject(
        id=row.id, name=row.name, hint=row.hint, scopes=scopes, created_at=unix(row.created_at), revoked_at=unix_or_none(row.revoked_at)
    )


def _row(session: Session, key_id: str) -> ApiKey:
    row = session.get(ApiKey, key_id)
    if row is None:
        raise NotFound(f"No API key {key_id!r}.", param="key_id")
    return row


def _active_admins(session: Session) -> list[str]:
    return list(session.scalars(select(ApiKey.id).where(ApiKey.scopes.contains(["admin"]), ApiKey.revoked_at.is_(None))))
