"""One transaction per request, and what has to follow its end: ring doorbells after COMMIT, remove bytes after ROLLBACK."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy.orm import Session, sessionmaker

_COMMITTED = "after_commit"
_ROLLED_BACK = "after_rollback"


@contextmanager
def unit_of_work(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """Commits at the end and then runs the ``after_commit`` actions; on any error rolls back and runs ``after_rollback``."""
    with sessions() as session:
        try:
            with session.begin():
                yield session
        except BaseException:
            _run(session, _ROLLED_BACK)
            raise
        _run(session, _COMMITTED)


def after_commit(session: Session, action: Callable[[], None]) -> None:
    session.info.setdefault(_COMMITTED, []).append(action)


def after_rollback(session: Session, action: Callable[[], None]) -> None:
    session.info.setdefault(_ROLLED_BACK, []).append(action)


def _run(session: Session, when: str) -> None:
    for action in session.info.pop(when, []):
        action()
