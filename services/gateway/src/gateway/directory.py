"""Who may call and what their model names mean: a copy of keys, aliases and models in memory, refreshed every second.

The token path asks this copy and not the database. A key or an alias that the copy does not know is looked up once in the
database, so new ones work at once; a revoked key dies with the next refresh.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import structlog
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from gateway.database import Database
from gateway.metrics import SNAPSHOT_AGE
from parampara.db.models import Alias, ApiKey, Deployment, Model, Run, VectorStore
from parampara.errors import NotFound, Unauthorized, Unavailable
from parampara.keys import Principal, bearer, hash_key, lookup, well_formed
from parampara.settings import GatewaySettings

log = structlog.get_logger("gateway.directory")
_MAX_REMEMBERED = 10_000
_UNKNOWN_SECONDS = 1.0


@dataclass(frozen=True)
class AliasEntry:
    name: str
    model: str | None
    url: str
    vector_store_id: str | None
    deploying: bool
    updated_at: int


@dataclass(frozen=True)
class ModelEntry:
    id: str
    base_model: str
    artifact_id: str
    created_at: int
    system_prompt: str | None = None
    """What stood before every question it was trained on."""


@dataclass(frozen=True)
class Snapshot:
    keys: Mapping[str, Principal] = field(default_factory=dict)
    """By hash."""
    aliases: Mapping[str, AliasEntry] = field(default_factory=dict)
    models: Mapping[str, ModelEntry] = field(default_factory=dict)
    taken: float = float("-inf")
    """``time.monotonic()`` of the moment the query began."""


@dataclass(frozen=True)
class Target:
    """What a request's ``model`` resolves to."""

    model: str
    """Immutable id, the name that the model server serves under."""
    url: str
    vector_store_id: str | None
    system_prompt: str | None = None


class Directory:
    """Call :meth:`start` inside the event loop, :meth:`close` at the end."""

    def __init__(self, database: Database, *, pepper: bytes, settings: GatewaySettings) -> None:
        self._database, self._pepper, self._settings = database, pepper, settings
        self.snapshot = Snapshot()
        self._unknown: dict[str, float] = {}
        self._asking = asyncio.Semaphore(2)
        self._loading = asyncio.Lock()
        self._loop_task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._try_refresh()
        self._loop_task = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)

    @property
    def age(self) -> float:
        return time.monotonic() - self.snapshot.taken

    async def refresh(self) -> None:
        """Read everything anew; what was committed before this call is in the snapshot after it.

        Raises:
            Unavailable: the database does not answer.
        """
        called = time.monotonic()
        async with self._loading:
            if self.snapshot.taken >= called:
                return  # another caller's query began after this call
            began = time.monotonic()
            try:
                parts = await self._database.run(lambda session: _read(session, default_url=self._settings.model_url))
            except SQLAlchemyError as error:
                raise Unavailable("The database does not answer just now; try again in a moment.", code="database_unavailable") from error
            self.snapshot = Snapshot(*parts, taken=began)

    async def authenticate(self, authorization: str | None) -> Principal:
        """The sender of a request.

        Raises:
            Unauthorized: no key, not a key, unknown or revoked.
            Unavailable: the copy is too old to trust.
        """
        key = bearer(authorization)
        if not well_formed(key):
            raise _unknown_key()
        hashed = hash_key(self._pepper, key)
        self._refuse_stale()
        principal = self.snapshot.keys.get(hashed)
        if principal is None:
            principal = await self._ask(hashed, key)
        return principal

    async def _ask(self, hashed: str, key: str) -> Principal:
        now = time.monotonic()
        if self._unknown.get(hashed, 0) > now:
            raise _unknown_key()
        async with self._asking:  # strangers with random keys may not crowd the database
            try:
                principal = await self._database.run(lambda session: lookup(session, self._pepper, key))
            except SQLAlchemyError as error:
                raise Unavailable("The database does not answer just now; try again in a moment.", code="database_unavailable") from error
        if principal is None:
            if len(self._unknown) >= _MAX_REMEMBERED:
                self._unknown.clear()
            self._unknown[hashed] = time.monotonic() + _UNKNOWN_SECONDS
            raise _unknown_key()
        return principal

    async def resolve(self, name: str) -> Target:
        """The model behind an alias or an immutable id.

        Raises:
            NotFound: ``model_not_found``, no such model, or one that no server serves now.
            Unavailable: it is being deployed for the first time.
        """
        target = self._find(name)
        if target is None and self.age > 0.2 and self._unknown.get(f"model {name}", 0) < time.monotonic():
            await self.refresh()
            target = self._find(name)
        if target is not None:
            return target
        if len(self._unknown) >= _MAX_REMEMBERED:
            self._unknown.clear()
        self._unknown[f"model {name}"] = time.monotonic() + _UNKNOWN_SECONDS
        raise self._not_served(name)

    def _find(self, name: str) -> Target | None:
        alias = self.snapshot.aliases.get(name)
        if alias is not None and alias.model is not None:
            return self._target(alias.model, alias.url, alias.vector_store_id)
        if name in self.snapshot.models:
            for alias in self.snapshot.aliases.values():
                if alias.model == name:
                    # an immutable id means the bare model: what is attached to an alias does not follow it
                    return self._target(name, alias.url, None)
        return None

    def _target(self, model: str, url: str, vector_store_id: str | None) -> Target:
        known = self.snapshot.models.get(model)
        return Target(model, url, vector_store_id, known.system_prompt if known else None)

    def _not_served(self, name: str) -> Exception:
        shown = name if len(name) <= 100 else name[:100] + "..."
        alias = self.snapshot.aliases.get(name)
        if alias is not None and alias.deploying:
            return Unavailable(f"The model {shown!r} is being deployed; try again in a moment.", code="model_starting")
        if alias is not None or name in self.snapshot.models:
            return NotFound(
                f"The model {shown!r} exists but is not deployed. GET /v1/models lists what is.", param="model", code="model_not_found"
            )
        return NotFound(f"The model {shown!r} does not exist. GET /v1/models lists what does.", param="model", code="model_not_found")

    def _refuse_stale(self) -> None:
        if self.age > self._settings.max_stale_seconds:
            raise Unavailable(
                "The database has not answered for too long to trust API keys; try again in a moment.", code="database_unavailable"
            )

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._settings.refresh_seconds)
            await self._try_refresh()
            SNAPSHOT_AGE.set(min(self.age, 1e9))

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except Unavailable as error:
            log.warning("keys and aliases not refreshed", age_seconds=round(self.age, 1), cause=repr(error.__cause__))


def _read(session: Session, *, default_url: str) -> tuple[dict[str, Principal], dict[str, AliasEntry], dict[str, ModelEntry]]:
    keys = {
        row.hash: Principal(key_id=row.id, name=row.name, scopes=frozenset(row.scopes))
        for row in session.execute(select(ApiKey.id, ApiKey.name, ApiKey.hash, ApiKey.scopes).where(ApiKey.revoked_at.is_(None)))
    }
    live = select(VectorStore.id).where(VectorStore.deleted_at.is_(None))
    stores = set(session.scalars(live.where(VectorStore.id.in_(select(Alias.vector_store_id)))))
    deploying = set(session.scalars(select(Deployment.alias).where(Deployment.status.in_(("pending", "starting")))))
    aliases = {
        row.name: AliasEntry(
            name=row.name,
            model=row.model,
            url=(row.url or default_url).rstrip("/"),
            vector_store_id=row.vector_store_id if row.vector_store_id in stores else None,
            deploying=row.name in deploying,
            updated_at=int(row.updated_at.timestamp()),
        )
        for row in session.scalars(select(Alias))
    }
    prompt = Run.recipe["stages"]["sft"]["system_prompt"].astext
    models = {
        row.id: ModelEntry(row.id, row.base_model, row.artifact_id, int(row.created_at.timestamp()), system_prompt)
        for row, system_prompt in session.execute(select(Model, prompt).outerjoin(Run, Run.id == Model.run_id)).tuples()
    }
    return keys, aliases, models


def _unknown_key() -> Unauthorized:
    return Unauthorized("This API key is not known here or was revoked. Check it, or ask an administrator for a new one.")
