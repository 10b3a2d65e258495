"""Events: pages, and the live stream over a real server."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import fastapi.routing
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from control_plane.services import events
from parampara.db.models import Event
from parampara.db.session import transaction
from parampara.settings import Settings
from tests.control_plane.line import work_through


class Stream:
    """A client of server-sent events that reads line by line, as a browser does."""

    def __init__(self, base_url: str, key: str, path: str, **headers: str) -> None:
        address = urlsplit(base_url)
        self.connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=20)
        self.connection.request("GET", path, headers={"Authorization": f"Bearer {key}", **headers})
        self.response = self.connection.getresponse()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Each event as its fields, each comment as ``{"comment": ...}``, until the server ends the stream."""
        fields: dict[str, Any] = {}
        for raw in self.response:
            line = raw.decode().rstrip("\r\n")
            if not line and fields:
                yield fields
                fields = {}
            elif line.startswith(":"):
                fields["comment"] = line[1:].strip()
            elif line:
                name, _, value = line.partition(": ")
                fields[name] = json.loads(value) if name == "data" else value

    def close(self) -> None:
        self.connection.close()


@pytest.fixture
def run_id(client: TestClient, run_body: dict[str, Any]) -> str:
    return client.post("/v1/runs", json=run_body).json()["id"]


def test_events_are_listed_in_pages(client: TestClient, run_id: str, sessions: sessionmaker[Session], plane_settings: Settings) -> None:
    work_through(sessions, plane_settings, run_id)
    everything = client.get(f"/v1/runs/{run_id}/events?limit=1000").json()
    assert everything["data"][0]["message"] == "run queued"
    assert everything["data"][-1]["message"] == "run succeeded"
    walked, after = [], None
    while True:
        page = client.get(f"/v1/runs/{run_id}/events", params={"limit": 7, **({"after": after} if after else {})}).json()
        walked += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert walked == everything["data"]
    newest = client.get(f"/v1/runs/{run_id}/events?order=desc&limit=1").json()
    assert newest["data"] == everything["data"][-1:]
    job_id = client.get(f"/v1/runs/{run_id}").json()["jobs"][0]["id"]
    of_job = client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert of_job
    assert {event["job_id"] for event in of_job} == {job_id}
    assert client.get(f"/v1/runs/{run_id}/events?after=yesterday").json()["error"]["param"] == "after"
    assert client.get(f"/v1/runs/{run_id}/events?after=evt_999999").status_code == 404


def test_the_stream_tells_everything_and_ends_with_the_run(
    base_url: str, admin_key: str, client: TestClient, run_id: str, sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    stream = Stream(base_url, admin_key, f"/v1/runs/{run_id}/events/stream")
    assert stream.response.status == 200
    assert stream.response.headers["Content-Type"].startswith("text/event-stream")
    worker = threading.Thread(target=work_through, args=(sessions, plane_settings, run_id))
    told = stream.messages()
    first = next(told)
    worker.start()
    got = [first, *told]
    worker.join()
    listed = client.get(f"/v1/runs/{run_id}/events?limit=1000").json()["data"]
    assert [message["data"] for message in got] == listed
    assert [message["id"] for message in got] == [event["id"] for event in listed]
    assert {message["event"] for message in got} == {event["type"] for event in listed}


def test_a_client_that_comes_back_goes_on_where_it_was(
    base_url: str, admin_key: str, client: TestClient, run_id: str, sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    work_through(sessions, plane_settings, run_id)
    ids = [event["id"] for event in client.get(f"/v1/runs/{run_id}/events?limit=1000").json()["data"]]
    path = f"/v1/runs/{run_id}/events/stream"
    again = Stream(base_url, admin_key, path, **{"Last-Event-ID": ids[4]})
    assert [message["id"] for message in again.messages()] == ids[5:]
    assert [message["id"] for message in Stream(base_url, admin_key, f"{path}?after={ids[-2]}").messages()] == ids[-1:]
    assert list(Stream(base_url, admin_key, path, **{"Last-Event-ID": ids[-1]}).messages()) == []


def test_an_event_that_commits_late_is_not_missed(
    base_url: str, admin_key: str, run_id: str, client: TestClient, sessions: sessionmaker[Session]
) -> None:
    stream = Stream(base_url, admin_key, f"/v1/runs/{run_id}/events/stream")
    told = stream.messages()
    with sessions() as slow:
        slow.add(Event(run_id=run_id, type="message", message="written first, committed last"))
        slow.flush()
        with transaction(sessions) as session:
            session.add(Event(run_id=run_id, type="message", message="written last, committed first"))
        seen = [next(told)["data"]["message"] for _ in range(2)]  # what came before: the run and its first job
        slow.commit()
    assert "written last, committed first" not in seen
    assert [next(told)["data"]["message"] for _ in range(2)] == ["written first, committed last", "written last, committed first"]
    stream.close()


def test_a_client_that_comes_back_misses_nothing_that_commits_late(
    client: TestClient, run_id: str, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "POLL_SECONDS", 0.01)

    def connection(last_event_id: str) -> list[str]:
        """What one connection tells in three looks."""

        async def told() -> list[str]:
            looks = iter([False] * 3)
            stopping = lambda: next(looks, True)  # noqa: E731
            return [event.id async for event in events.tail(sessions, run_id, after=after, stopping=stopping)]

        with transaction(sessions) as session:
            after = events.place(session, last_event_id, param="after")
        return asyncio.run(told())

    with sessions() as slow:
        slow.add(Event(run_id=run_id, type="message", message="written first, committed last"))
        slow.flush()
        with transaction(sessions) as session:
            session.add(Event(run_id=run_id, type="message", message="written last, committed first"))
        first = connection("0")
        slow.commit()
    listed = [event["id"] for event in client.get(f"/v1/runs/{run_id}/events").json()["data"]]
    assert len(listed) == 4
    assert first + connection(first[-1]) == listed


def test_a_run_that_has_ended_is_told_to_its_end(client: TestClient, run_id: str, sessions: sessionmaker[Session]) -> None:
    """The last events wait for an older transaction, and the stream waits for them."""
    client.post(f"/v1/runs/{run_id}/cancel")
    with sessions() as open_one:
        open_one.execute(text("SELECT pg_current_xact_id()"))
        with transaction(sessions) as session:
            session.add(Event(run_id=run_id, type="message", message="the last one"))
        assert events._poll(sessions, run_id, events.START).held_back

        async def told() -> list[str]:
            messages = []
            async for event in events.tail(sessions, run_id, after=events.START, stopping=lambda: False):
                messages.append(event.message)
                open_one.rollback()  # while the stream is at it
            return messages

        assert asyncio.run(told())[-1] == "the last one"


def test_silence_is_filled_with_comments(base_url: str, admin_key: str, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vars(fastapi.routing)["_PING_INTERVAL"] == 15
    monkeypatch.setattr("fastapi.routing._PING_INTERVAL", 0.2)
    stream = Stream(base_url, admin_key, f"/v1/runs/{run_id}/events/stream")
    told = stream.messages()
    while "comment" not in (message := next(told)):
        assert message["data"]["run_id"] == run_id
    stream.close()


def test_a_stream_of_no_run_is_a_404_and_a_bad_cursor_a_400(client: TestClient, run_id: str) -> None:
    assert client.get("/v1/runs/run_x/events/stream").status_code == 404
    answer = client.get(f"/v1/runs/{run_id}/events/stream", headers={"Last-Event-ID": "1; DROP TABLE"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Last-Event-ID")


def test_a_stopping_server_ends_its_streams(base_url: str, admin_key: str, run_id: str, app: FastAPI) -> None:
    stream = Stream(base_url, admin_key, f"/v1/runs/{run_id}/events/stream")
    told = stream.messages()
    next(told)
    started = time.monotonic()
    app.state.stopping = True
    list(told)
    assert time.monotonic() - started < 5
