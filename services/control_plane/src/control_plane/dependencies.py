"""What routes ask for: a session, the settings, and a key with the right scope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import Depends, Query, Request, Security
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session, sessionmaker

from control_plane.transactions import unit_of_work
from parampara.keys import Principal
from parampara.schemas.api import Order, Scope
from parampara.settings import Settings

_bearer = HTTPBearer(auto_error=False, scheme_name="API key", description="`Authorization: Bearer pp_...`")


def requires(scope: Scope) -> Dependency:
    """Router dependency: the key must hold ``scope`` (``admin`` holds all)."""

    async def check(request: Request, _: Annotated[Any, Security(_bearer)]) -> Principal:
        principal: Principal = request.state.principal  # put there by control_plane.auth
        principal.require(scope)
        return principal

    return Depends(check)


def open_session(request: Request) -> Iterator[Session]:
    with unit_of_work(request.app.state.sessions) as session:
        yield session


def get_sessions(request: Request) -> sessionmaker[Session]:
    return request.app.state.sessions


def get_settings(request: Request) -> Settings:
    return request.app.state.settings


# scope="function": COMMIT comes before the answer. With the default a client could be told of a row that is never written
SessionDep = Annotated[Session, Depends(open_session, scope="function")]
SessionsDep = Annotated[sessionmaker[Session], Depends(get_sessions)]
SettingsDep = Annotated[Settings, Depends(get_settings)]

After = Annotated[str | None, Query(max_length=80, description="`last_id` of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="At most this many objects.")]
Ordering = Annotated[Order, Query(description="By time of creation.")]
