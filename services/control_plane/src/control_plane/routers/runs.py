"""``/v1/runs``: the whole line, from base model to deployment, as one object."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from control_plane.dependencies import After, Limit, Ordering, SessionDep, SessionsDep, SettingsDep, requires
from control_plane.services import events, runs
from control_plane.transactions import after_commit
from parampara.execution.queue import request_cancel, retry_run
from parampara.schemas.api import EventObject, Order, Page, RunCreate, RunObject, RunSummary, State

router = APIRouter(prefix="/v1/runs", tags=["Runs"], dependencies=[requires("jobs")])


@router.post("", status_code=202, summary="Start a run")
def create_run(
    request: Request,
    response: Response,
    sessions: SessionsDep,
    settings: SettingsDep,
    body: RunCreate,
    idempotency_key: Annotated[str | None, Header(description="The same key and body make one run, however often they are sent.")] = None,
) -> RunObject:
    """Recipe, base model and the content of every data set are checked first; then run and jobs are written in one
    transaction. After the `202` the run is never lost, whatever process dies."""
    run = runs.create(sessions, settings, body, idempotency_key=idempotency_key)
    request.app.state.ringer.ring_soon()
    response.headers["Location"] = f"/v1/runs/{run.id}"
    return run


@router.get("", summary="List runs")
def list_runs(
    session: SessionDep,
    status: Annotated[State | None, Query(description="Only runs in this state.")] = None,
    after: After = None,
    limit: Limit = 20,
    order: Ordering = "desc",
) -> Page[RunSummary]:
    return runs.list_runs(session, state=status, after=after, limit=limit, order=order)


@router.get("/{run_id}", summary="Get a run")
def get_run(session: SessionDep, run_id: str) -> RunObject:
    """With its jobs, share done, time left, gates and artifacts."""
    return runs.get(session, run_id)


@router.post("/{run_id}/cancel", summary="Cancel a run")
def cancel_run(request: Request, session: SessionDep, run_id: str) -> RunObject:
    """Jobs that no worker holds are cancelled at once; a running one stops within seconds, and the run stays `running` until then."""
    request_cancel(session, runs.get_row(session, run_id).id)
    return _steered(request, session, run_id)


@router.post("/{run_id}/retry", summary="Retry a run")
def retry(request: Request, session: SessionDep, run_id: str) -> RunObject:
    """Puts every failed or cancelled job back; what succeeded stays, and training goes on from its last checkpoint."""
    retry_run(session, runs.get_row(session, run_id).id)
    return _steered(request, session, run_id)


@router.get("/{run_id}/events", summary="List a run's events")
def list_events(
    session: SessionDep,
    run_id: str,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    order: Annotated[Order, Query(description="`asc`: oldest first.")] = "asc",
) -> Page[EventObject]:
    runs.get_row(session, run_id)
    return events.list_events(session, run_id=run_id, after=after, limit=limit, order=order)


def _start(session: SessionDep, run_id: str, last_event_id: Annotated[str | None, Header()] = None, after: After = None) -> events.Place:
    """Checked before the stream opens, so that a wrong id is a 404 and not an empty stream."""
    runs.get_row(session, run_id)
    if last_event_id:
        return events.place(session, last_event_id, param="Last-Event-ID")
    return events.place(session, after, param="after") if after else events.START


@router.get("/{run_id}/events/stream", summary="Follow a run", response_class=EventSourceResponse)
async def stream_events(
    request: Request, sessions: SessionsDep, run_id: str, start: Annotated[events.Place, Depends(_start, scope="function")]
) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: the history from `Last-Event-ID` (or `after`) on, then each event as it happens, a comment every
    15 s of silence, and the end of the stream once the run has ended and everything was told."""
    state = request.app.state
    async for event in events.tail(sessions, run_id, after=start, stopping=lambda: state.stopping):
        yield ServerSentEvent(data=event, event=event.type, id=event.id)


def _steered(request: Request, session: SessionDep, run_id: str) -> RunObject:
    after_commit(session, request.app.state.ringer.ring_soon)
    session.flush()
    session.expire_all()
    return runs.get(session, run_id)
