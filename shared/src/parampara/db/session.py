"""Engines and sessions. One transaction per request, per claim, per finish; nobody else commits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, TimeoutError
from sqlalchemy.orm import Session, sessionmaker

from parampara.settings import DatabaseSettings

# a dead or half-open connection must show within seconds, not after the kernel's two hours
_CONNECT_ARGS = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
}


def make_engine(settings: DatabaseSettings, *, application: str) -> Engine:
    return create_engine(
        settings.url,
        pool_size=settings.pool_size,
        max_overflow=5,
        pool_pre_ping=True,
        connect_args={**_CONNECT_ARGS, "application_name": application},
    )


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine, expire_on_commit=False)


def is_away(error: BaseException) -> bool:
    """Whether the database could not be asked, or could not answer now, so that asking again is of use."""
    if isinstance(error, OperationalError | InterfaceError | TimeoutError):
        return True
    return isinstance(error, DBAPIError) and error.connection_invalidated


@contextmanager
def transaction(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """One unit of work: commits at the end, rolls back on any error."""
    with sessions() as session, session.begin():
        yield session
