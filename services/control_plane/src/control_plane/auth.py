"""Default deny: every path needs an API key unless it is named here, whatever its router says."""

from __future__ import annotations

from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from parampara.db.session import transaction
from parampara.http import DOCS_PATHS
from parampara.keys import Principal, authenticate

PUBLIC_PATHS = frozenset({"/health", "/livez", "/readyz"} | DOCS_PATHS)


class Authentication:
    """ASGI layer that puts the :class:`~parampara.keys.Principal` of a request into its state, or answers 401.

    It runs before routing and before the body is read, so a stranger learns nothing and sends nothing.
    """

    def __init__(self, app: ASGIApp, *, sessions: sessionmaker[Session], pepper: bytes) -> None:
        self.app = app
        self.sessions = sessions
        self.pepper = pepper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            principal = await run_in_threadpool(self._authenticate, Headers(scope=scope).get("authorization"))
            scope.setdefault("state", {})["principal"] = principal
        await self.app(scope, receive, send)

    def _authenticate(self, authorization: str | None) -> Principal:
        with transaction(self.sessions) as session:
            return authenticate(session, self.pepper, authorization)
