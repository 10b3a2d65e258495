"""The control plane behind the gateway: the real one, and a scripted one where bytes in flight matter."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from control_plane.app import create_app
from control_plane.server import prepare
from gateway.directory import Directory
from parampara.errors import Unavailable
from tests.gateway.conftest import Running
from tests.gateway.servers import served, wait_until


@pytest.fixture
def platform(start_gateway: Callable[..., Running], settings: Any, sessions: Any) -> Iterator[Running]:
    prepare(settings, sessions)
    with served(create_app(settings, sessions)) as url:
        yield start_gateway(control_plane_url=url)


def test_files_go_up_and_come_down_with_the_sdk(platform: Running) -> None:
    content = b'{"text": "Ketu rules Ashwini."}\n' * 20_000
    file = platform.sdk.files.create(file=("book.jsonl", content), purpose="assistants")
    assert (file.bytes, file.filename) == (len(content), "book.jsonl")
    assert platform.sdk.files.content(file.id).content == content
    assert [entry.id for entry in platform.sdk.files.list()] == [file.id]
    assert platform.sdk.files.delete(file.id).deleted


def test_errors_of_the_control_plane_come_through_whole(platform: Running) -> None:
    response = platform.http.get("/v1/files/file-nothing", headers={"x-request-id": "mine"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "file_not_found")
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert platform.http.get("/v1/runs?limit=nonsense").json()["error"]["param"] == "limit"


def test_who_attaches_a_vector_store_finds_it_attached_in_the_next_request(platform: Running) -> None:
    platform.settings.gateway.refresh_seconds = 3600
    time.sleep(0.3)
    store = platform.sdk.vector_stores.create(name="books")
    response = platform.http.post("/v1/aliases/kp", json={"vector_store_id": store.id})
    assert response.status_code == 200, response.text
    assert platform.http.get("/v1/models/kp").json()["parampara"]["vector_store_id"] == store.id
    assert "attached to the alias kp" in platform.http.delete(f"/v1/vector_stores/{store.id}").json()["error"]["message"]


def test_the_documentation_covers_both(platform: Running) -> None:
    paths = httpx.get(f"{platform.url}/openapi.json").json()["paths"]
    assert {"/v1/files", "/v1/runs", "/v1/chat/completions", "/v1/vector_stores", "/v1/models"} <= set(paths)


def test_a_path_with_dots_goes_nowhere(platform: Running) -> None:
    address = urlsplit(platform.url)
    for path in ("/v1/files/../../metrics", "/v1/files/%2e%2e/%2e%2e/metrics", "/v1/files/..%2f..%2fmetrics"):
        connection = http.client.HTTPConnection(str(address.hostname), address.port)  # sends the path as it is
        connection.request("GET", path, headers={"authorization": f"Bearer {platform.key}"})
        assert connection.getresponse().status == 404, path
        connection.close()


def test_a_control_plane_that_is_away_is_a_503(gateway: Running) -> None:
    gateway.settings.gateway.control_plane_url = "http://127.0.0.1:9"
    response = gateway.http.get("/v1/runs")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "control_plane_unavailable")


class Script:
    """A control plane that counts bytes, streams, and sees who leaves."""

    def __init__(self) -> None:
        self.received = 0
        self.sha256 = ""
        self.headers: dict[str, str] = {}
        self.left: list[float] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        if scope["path"].endswith("/stream"):
            await self._stream(receive, send)
            return
        if scope["path"].endswith("/content"):
            headers = [
                (b"content-type", b"application/octet-stream"),
                *([(b"content-length", b"10000")] if b"declared" in scope["query_string"] else []),
            ]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"half of it", "more_body": True})
            raise ConnectionError("the disk died")  # uvicorn breaks the connection off
        digest, more = hashlib.sha256(), scope["method"] == "POST"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left.append(time.monotonic())
                return
            digest.update(message.get("body", b""))
            self.received += len(message.get("body", b""))
            more = message.get("more_body", False)
        self.sha256 = digest.hexdigest()
        headers = [(b"content-type", b"application/json"), (b"x-own", b"kept"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2")]
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"path": scope["raw_path"].decode()}).encode()})

    async def _stream(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.ensure_future(receive())
        for number in range(1000):
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(0.1)
            if gone.done() and gone.result()["type"] == "http.disconnect":
                self.left.append(time.monotonic())
                return
            if gone.done():
                gone = asyncio.ensure_future(receive())


@pytest.fixture
def scripted(start_gateway: Callable[..., Running]) -> Iterator[tuple[Running, Script]]:
    script = Script()
    with served(script) as url:
        yield start_gateway(control_plane_url=url), script


def test_a_large_upload_passes_without_being_held_in_memory(scripted: tuple[Running, Script]) -> None:
    gateway, script = scripted
    block, blocks = os.urandom(2**20), 48
    before = _resident()
    response = gateway.http.post("/v1/files", content=(block for _ in range(blocks)), headers={"content-type": "application/octet-stream"})
    assert (response.status_code, script.received) == (201, blocks * 2**20)
    assert script.sha256 == hashlib.sha256(block * blocks).hexdigest()
    assert _resident() - before < 40 * 2**20


def test_headers_pass_both_ways_but_for_those_of_the_connection(scripted: tuple[Running, Script]) -> None:
    gateway, script = scripted
    response = gateway.http.post(
        "/v1/runs/a%2Fb?x=%20y&x=2", content=b"{}", headers={"idempotency-key": "k", "connection": "close", "x-request-id": "r1"}
    )
    assert response.json() == {"path": "/v1/runs/a%2Fb"}
    assert response.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert (script.headers["idempotency-key"], script.headers["x-request-id"]) == ("k", "r1")
    assert script.headers["authorization"] == f"Bearer {gateway.key}"
    assert "close" not in script.headers.get("connection", "")


def test_an_upload_over_the_limit_is_refused_before_it_is_read(scripted: tuple[Running, Script]) -> None:
    gateway, script = scripted
    gateway.settings.max_upload_bytes = 1000
    declared = gateway.http.post("/v1/files", content=b"x" * 1_100_000)
    chunked = gateway.http.post("/v1/files", content=iter([b"x" * 600_000] * 3))
    for response in (declared, chunked):
        assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    assert script.sha256 == ""


def test_an_event_stream_arrives_as_it_is_sent_and_ends_when_the_client_leaves(scripted: tuple[Running, Script]) -> None:
    gateway, script = scripted
    began = time.monotonic()
    with gateway.http.stream("GET", "/v1/runs/run_1/stream") as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(3)] == ["data: 0", "", "data: 1"]
        assert time.monotonic() - began < 5
    wait_until(lambda: bool(script.left), 3)


@pytest.mark.parametrize("length", ["declared", "chunked"])
def test_a_download_that_breaks_off_breaks_off_and_gets_no_error_text_into_it(scripted: tuple[Running, Script], length: str) -> None:
    gateway, _ = scripted
    received = []
    with gateway.http.stream("GET", f"/v1/files/file-1/content?{length}") as response, pytest.raises(httpx.RemoteProtocolError):
        received.extend(response.iter_bytes())
    assert b"".join(received) == b"half of it"


def test_a_new_key_reaches_its_owner_even_when_the_directory_can_not_be_refreshed(
    platform: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(self: Directory) -> None:
        raise Unavailable("The database does not answer just now.")

    monkeypatch.setattr(Directory, "refresh", fail)
    response = platform.http.post("/v1/api_keys", json={"name": "mine", "scopes": ["chat"]})
    assert response.status_code < 300, response.text
    monkeypatch.undo()
    platform.key = response.json()["key"]
    assert platform.ask().status_code == 200


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
