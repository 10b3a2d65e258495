"""The history of a run or a job: pages of it, and a live tail."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

from sqlalchemy import Select, func, select, text
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from parampara.db.models import Event, Run
from parampara.db.session import transaction
from parampara.errors import InvalidRequest
from parampara.schemas.api import EventObject, Order, Page, unix

TERMINAL = ("succeeded", "failed", "cancelled")
POLL_SECONDS = 0.5
_BATCH = 500
_ID = re.compile(r"(?:evt_)?([0-9]{1,18})")


def list_events(
    session: Session, *, run_id: str | None = None, job_id: str | None = None, after: str | None, limit: int, order: Order
) -> Page[EventObject]:
    query = _of(run_id, job_id)
    if after is not None:
        place = number(after, param="after")
        query = query.where(Event.id > place if order == "asc" else Event.id < place)
    rows = list(session.scalars(query.order_by(Event.id.asc() if order == "asc" else Event.id.desc()).limit(limit + 1)))
    data = [show(row) for row in rows[:limit]]
    return Page(data=data, has_more=len(rows) > limit, first_id=data[0].id if data else None, last_id=data[-1].id if data else None)


async def tail(sessions: sessionmaker[Session], run_id: str, *, after: int, stopping: Callable[[], bool]) -> AsyncIterator[EventObject]:
    """Events of a run after ``after``, as they are committed, until the run has ended and all of them were told.

    Ids are handed out before COMMIT, so a lower one may become visible after a higher one: the newest ten seconds are read
    again each time, and what was told already is left out.
    """
    floor, told = after, set[int]()
    while not stopping():
        rows, state, settled = await run_in_threadpool(_poll, sessions, run_id, floor)
        for row in rows:
            if row.id not in told:
                told.add(row.id)
                yield show(row)
        full = len(rows) == _BATCH
        if not full and state in (None, *TERMINAL):
            return
        floor = max(floor, rows[-1].id if full else settled or floor)
        told = {known for known in told if known > floor}
        if not full:
            await asyncio.sleep(POLL_SECONDS)


def number(event_id: str, *, param: str) -> int:
    """The place of an event in the order of all.

    Raises:
        InvalidRequest: not the id of an event.
    """
    match = _ID.fullmatch(event_id)
    if match is None:
        raise InvalidRequest(f"{param}: {event_id[:80]!r} is not the id of an event (evt_<number>).", param=param)
    return int(match[1])


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


def _poll(sessions: sessionmaker[Session], run_id: str, floor: int) -> tuple[list[Event], str | None, int | None]:
    """Events above ``floor``, the run's state (None: deleted), and the newest id that no running transaction can undercut."""
    with transaction(sessions) as session:
        state = session.scalar(select(Run.state).where(Run.id == run_id))  # before the events: none of an ended run is missed
        rows = list(session.scalars(_of(run_id, None).where(Event.id > floor).order_by(Event.id).limit(_BATCH)))
        old = _of(run_id, None).with_only_columns(func.max(Event.id)).where(Event.created_at < func.now() - text("interval '10 seconds'"))
        return rows, state, session.scalar(old)


def _of(run_id: str | None, job_id: str | None) -> Select[Event]:
    if run_id is None:
        return select(Event).where(Event.job_id == job_id)
    return select(Event).where(Event.run_id == run_id)
