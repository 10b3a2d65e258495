"""The history of a run or a job: pages of it, and a live tail."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from sqlalchemy import BigInteger, Select, Text, cast, func, select, tuple_
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from parampara.db.models import Event, Run
from parampara.db.session import transaction
from parampara.errors import InvalidRequest, NotFound
from parampara.schemas.api import EventObject, Order, Page, unix

TERMINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 0.5
_BATCH = 500
_ID = re.compile(r"(?:evt_)?([0-9]{1,18})")
_order = tuple_(Event.xid, Event.id)
_settled = Event.xid < cast(cast(func.pg_snapshot_xmin(func.pg_current_snapshot()), Text), BigInteger)
"""No transaction that is open now, or begins later, has a lower number."""


Place = tuple[int, int]
"""Of an event among all: (number of the transaction that wrote it, id)."""
START: Place = (0, 0)


def list_events(
    session: Session, *, run_id: str | None = None, job_id: str | None = None, after: str | None, limit: int, order: Order
) -> Page[EventObject]:
    """One page of what is visible now. Only :func:`tail` is sure to tell everything of a run that goes on."""
    query = _of(run_id, job_id)
    if after is not None:
        bound = tuple_(*place(session, after, param="after"))
        query = query.where(_order > bound if order == "asc" else _order < bound)
    direction = (Event.xid.asc(), Event.id.asc()) if order == "asc" else (Event.xid.desc(), Event.id.desc())
    rows = list(session.scalars(query.order_by(*direction).limit(limit + 1)))
    data = [show(row) for row in rows[:limit]]
    return Page(data=data, has_more=len(rows) > limit, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


async def tail(sessions: sessionmaker[Session], run_id: str, *, after: Place, stopping: Callable[[], bool]) -> AsyncIterator[EventObject]:
    """Events of a run after a place, until the run has ended and all of them were told: each once, also to a client that comes
    back with the last id it has seen.

    An event is told when no transaction older than its own is open any more, so that nothing can come before it later.
    """
    while not stopping():
        batch = await run_in_threadpool(_poll, sessions, run_id, after)
        for row in batch.events:
            after = (row.xid, row.id)
            yield show(row)
        if batch.more:
            continue
        if not batch.held_back and batch.state in (None, *TERMINAL):
            return
        await asyncio.sleep(POLL_SECONDS)


def place(session: Session, event_id: str, *, param: str) -> Place:
    """Where an event stands in the order of all; ``0`` is before the first.

    Raises:
        InvalidRequest: not the id of an event.
        NotFound: no such event.
    """
    match = _ID.fullmatch(event_id)
    if match is None:
        raise InvalidRequest(f"{param}: {event_id[:80]!r} is not the id of an event (evt_<number>).", param=param)
    if (number := int(match[1])) == 0:
        return START
    xid = session.scalar(select(Event.xid).where(Event.id == number))
    if xid is None:
        raise NotFound(f"{param}: there is no event evt_{number}.", param=param)
    return xid, number


def show(row: Event) -> EventObject:
    return EventObject.model_validate(
        {
            "id": f"evt_{row.id}",
            "run_id": row.run_id,
            "job_id": row.job_id,
            "attempt": row.attempt,
            "type": row.type,
            "level": row.level,
            "message": row.message,
            "data": row.data,
            "created_at": unix(row.created_at),
        }
    )


@dataclass(frozen=True)
class _Batch:
    events: list[Event]
    state: str | None
    """The run's; None: it was deleted."""
    more: bool
    held_back: bool
    """Further events are there, but an older transaction is still open."""


def _poll(sessions: sessionmaker[Session], run_id: str, after: Place) -> _Batch:
    with transaction(sessions) as session:
        state = session.scalar(select(Run.state).where(Run.id == run_id))  # before the events: none of an ended run is missed
        query = _of(run_id, None).add_columns(_settled).where(_order > tuple_(*after)).order_by(Event.xid, Event.id).limit(_BATCH)
        rows = session.execute(query).tuples().all()
    events = [event for event, settled in rows if settled]  # the first ones: they are ordered by transaction
    held_back = len(events) < len(rows)
    return _Batch(events, state, more=len(rows) == _BATCH and not held_back, held_back=held_back)


def _of(run_id: str | None, job_id: str | None) -> Select[Event]:
    if run_id is None:
        return select(Event).where(Event.job_id == job_id)
    return select(Event).where(Event.run_id == run_id)
