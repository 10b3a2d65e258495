"""What the FastAPI routes (models, vector stores, health, documentation) ask for. The token path does not come through here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session

from gateway.database import Database
from gateway.directory import Directory
from gateway.retrieval import Retriever
from gateway.ringing import Ringer
from parampara.db.session import transaction
from parampara.errors import Forbidden
from parampara.keys import Principal
from parampara.settings import Settings

_bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="`Authorization: Bearer pp_...`")


@dataclass(frozen=True)
class Services:
    """What the routes work with."""

    settings: Settings
    database: Database
    directory: Directory
    retriever: Retriever
    ringer: Ringer
    client: aiohttp.ClientSession


def services(request: Request) -> Services:
    return request.app.state.services


def _session(request: Request) -> Iterator[Session]:
    parts = services(request)
    with transaction(parts.database.sessions) as session:
        yield session
    if request.method != "GET":
        parts.ringer.ring_soon()  # after COMMIT; what was queued in it starts without waiting for a poll


# scope="function": COMMIT comes before the answer
SessionDep = Annotated[Session, Depends(_session, scope="function")]


def _principal(request: Request, _: Annotated[Any, Security(_bearer)]) -> Principal:
    return request.scope["parampara.principal"]


def may_read(principal: Annotated[Principal, Depends(_principal)]) -> None:
    """``chat`` or ``jobs``."""
    if not principal.scopes & {"admin", "chat", "jobs"}:
        raise Forbidden("This API key has none of the scopes admin, chat and jobs; ask an administrator for a key that has.")


def may_write(principal: Annotated[Principal, Depends(_principal)]) -> None:
    principal.require("jobs")
