"""Who gets in, how many at a time, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import select

from gateway.passthrough import PREFIXES
from parampara.db.models import Alias, ApiKey, Deployment, Model
from parampara.keys import new_key
from tests.contracts.test_docs import check as check_docs
from tests.gateway.conftest import ARTIFACT, MODEL, Running, add_key
from tests.gateway.servers import wait_until

ROUTES = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/kp"),
    ("GET", "/v1/vector_stores"),
    ("POST", "/v1/vector_stores"),
    ("POST", "/v1/vector_stores/vs_1/search"),
    ("GET", "/v1/anything/else"),
    ("GET", "/metrics"),
    ("GET", "/"),
    *(("GET", prefix) for prefix in PREFIXES),
    *(("POST", prefix + "/x") for prefix in PREFIXES),
]


def test_every_route_but_health_and_docs_wants_a_key(gateway: Running) -> None:
    mistyped, wrong = {"authorization": "Bearer sk-123"}, {"authorization": f"Bearer {new_key()}"}
    with httpx.Client(base_url=gateway.url) as client:
        for method, path in ROUTES:
            for headers, code in [
                ({}, "missing_api_key"),
                (mistyped, "invalid_api_key"),
                (wrong, "invalid_api_key"),
            ]:
                response = client.request(method, path, headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, code), (method, path)
        for path in ("/health", "/livez", "/readyz"):
            assert client.get(path).status_code == 200, path
        check_docs(client)


def test_every_route_of_the_web_part_is_behind_the_key(gateway: Running) -> None:
    """Routes that someone adds later are covered: the list comes from the schema itself."""
    with httpx.Client(base_url=gateway.url) as client:
        paths = client.get("/openapi.json").json()["paths"]
        open_ones = {path for path, methods in paths.items() for method in methods if client.request(method, path).status_code != 401}
    assert open_ones == {"/health", "/livez", "/readyz"}


def test_a_new_key_works_at_once_and_a_revoked_one_dies_within_a_refresh(start_gateway: Callable[..., Running]) -> None:
    gateway = start_gateway(refresh_seconds=0.3)
    gateway.key = add_key(gateway.sessions, gateway.settings, "chat")
    assert gateway.ask().status_code == 200
    with gateway.sessions.begin() as session:
        row = session.scalars(select(ApiKey).where(ApiKey.id == f"key_{gateway.key[3:15]}")).one()
        row.revoked_at = row.created_at
    wait_until(lambda: gateway.ask().status_code == 401, 2)


def test_scopes(gateway: Running) -> None:
    gateway.key = add_key(gateway.sessions, gateway.settings, "jobs")
    assert gateway.ask().json()["error"]["code"] == "insufficient_permissions"
    assert gateway.http.get("/v1/vector_stores").status_code == 200
    gateway.key = add_key(gateway.sessions, gateway.settings, "chat")
    assert gateway.ask().status_code == 200
    assert gateway.http.post("/v1/vector_stores", json={}).status_code == 403


def test_a_new_alias_works_at_once_and_a_deploying_one_is_a_503(start_gateway: Callable[..., Running]) -> None:
    gateway = start_gateway(refresh_seconds=60)
    time.sleep(0.3)
    with gateway.sessions.begin() as session:
        session.add(Alias(name="new", model=MODEL, url=gateway.script.url, generation=1, active_generation=1))
        session.add_all([Alias(name="soon", generation=1), Alias(name="failed", generation=1)])
        session.add(Model(id="ft:other", base_model="tiny-llama", artifact_id=ARTIFACT))
        session.flush()
        deployment = {"model": MODEL, "artifact_id": ARTIFACT, "generation": 1}
        session.add(Deployment(id="dep_1", alias="soon", status="starting", **deployment))
        session.add(Deployment(id="dep_2", alias="failed", status="failed", **deployment))
    assert gateway.ask(model="new").status_code == 200
    starting = gateway.ask(model="soon")
    assert (starting.status_code, starting.json()["error"]["code"]) == (503, "model_starting")
    for never in ("failed", "ft:other"):  # waiting for it would be in vain
        assert gateway.ask(model=never).json()["error"]["code"] == "model_not_found"
    assert gateway.http.get("/v1/models/ft:other").json()["parampara"]["served"] is False


def test_models_with_the_sdk(gateway: Running) -> None:
    assert [model.id for model in gateway.sdk.models.list()] == ["kp", MODEL, "all-minilm-l6-v2"]
    assert gateway.sdk.models.retrieve(MODEL).owned_by == "parampara"
    assert gateway.http.get("/v1/models/nothing").json()["error"]["code"] == "model_not_found"


def test_embeddings_with_the_sdk(start_gateway: Callable[..., Running], embedder_url: str) -> None:
    gateway = start_gateway(embedder_url=embedder_url)
    answer = gateway.sdk.embeddings.create(model="all-minilm-l6-v2", input=["one", "two"], encoding_format="float")
    assert [len(item.embedding) for item in answer.data] == [384, 384]
    for change, param in [
        ({"model": "x"}, "model"),
        ({"input": [1]}, "input[0]"),
        ({"dimensions": 5}, "dimensions"),
        ({"trunc": 1}, "trunc"),
    ]:
        response = gateway.http.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": "a", **change})
        assert response.json()["error"]["param"] == param, response.text


def test_an_embedder_that_is_away_is_a_503(gateway: Running) -> None:
    gateway.settings.gateway.embedder_url = "http://127.0.0.1:9"
    response = gateway.http.post("/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "embedder_unavailable")


def test_work_over_the_limit_is_refused_at_once(start_gateway: Callable[..., Running]) -> None:
    gateway = start_gateway(max_inflight=3, max_inflight_per_key=2)
    gateway.script.delay = 1.0
    other = Running(gateway.url, add_key(gateway.sessions, gateway.settings, "chat"), gateway.settings, gateway.sessions, gateway.script)
    with ThreadPoolExecutor(8) as pool:
        mine = [pool.submit(gateway.ask) for _ in range(2)]
        wait_until(lambda: len(gateway.script.requests) == 2)
        began = time.monotonic()
        refused = gateway.ask()
        assert time.monotonic() - began < 0.8
        assert "This key has 2 requests" in refused.json()["error"]["message"]
        theirs = pool.submit(other.ask)
        wait_until(lambda: len(gateway.script.requests) == 3)
        full = other.ask()
        assert "limit 3" in full.json()["error"]["message"]
        assert [future.result().status_code for future in [*mine, theirs]] == [200, 200, 200]
    for response in (refused, full):
        assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert gateway.ask().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_generation(gateway: Running, stream: bool) -> None:
    gateway.script.delay = 0.5 if stream else 30.0
    gateway.script.text = "x" * 400
    for _ in range(5):
        seen = len(gateway.script.requests)
        body = json.dumps({"model": "kp", "stream": stream, "messages": [{"role": "user", "content": "a"}]})
        client = _send(gateway, "/v1/chat/completions", body)
        wait_until(lambda seen=seen: len(gateway.script.requests) == seen + 1)
        if stream:
            assert b"200 OK" in client.recv(4096)
        client.close()
        left = time.monotonic()
        wait_until(lambda seen=seen: len(gateway.script.cancelled) == seen + 1, 5)
        assert gateway.script.cancelled[-1] - left < 1.0
    assert "parampara_gateway_inflight 0.0" in gateway.http.get("/metrics").text


def test_a_client_that_leaves_while_it_sends_is_no_error(gateway: Running) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\nContent-Length: 500\r\n\r\n"
    address = urlsplit(gateway.url)
    with socket.create_connection((str(address.hostname), address.port or 0)) as client:
        client.sendall(head.encode() + b'{"model"')
        time.sleep(0.1)
    wait_until(lambda: 'status="499"' in gateway.http.get("/metrics").text)
    assert gateway.script.requests == []


def test_chat_outlives_the_database_for_a_while(start_gateway: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import OperationalError

    from gateway.database import Database

    gateway = start_gateway(max_stale_seconds=1.5, refresh_seconds=0.1)
    assert gateway.ask().status_code == 200

    async def away(*_: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("connection refused"))

    monkeypatch.setattr(Database, "run", away)
    stranger = httpx.get(f"{gateway.url}/v1/models", headers={"authorization": f"Bearer {new_key()}"})
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (503, "database_unavailable")
    assert gateway.ask().status_code == 200
    wait_until(lambda: gateway.ask().status_code == 503, 5)
    assert httpx.get(f"{gateway.url}/readyz").status_code == 503


def test_health_says_what_is_away(start_gateway: Callable[..., Running], embedder_url: str) -> None:
    gateway = start_gateway(embedder_url=embedder_url, control_plane_url="http://127.0.0.1:9")
    health = httpx.get(f"{gateway.url}/health")
    assert health.json() == {"status": "degraded", "database": "ok", "control_plane": "away", "embedder": "ok", "model_server": "ok"}


def test_a_crowd_of_streams_arrives_whole(gateway: Running) -> None:
    gateway.script.text = "Answer: Ketu rules Ashwini, Magha and Mula. " * 5

    async def one(client: httpx.AsyncClient) -> str:
        body = {"model": "kp", "stream": True, "messages": [{"role": "user", "content": "a"}]}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            events = [line[6:] async for line in response.aiter_lines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events)

    async def crowd() -> list[str]:
        headers = {"authorization": f"Bearer {gateway.key}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers, timeout=30) as client:
            return await asyncio.gather(*(one(client) for _ in range(32)))

    assert set(asyncio.run(crowd())) == {gateway.script.text}
    assert threading.active_count() < 100


def _send(gateway: Running, path: str, body: str) -> socket.socket:
    address = urlsplit(gateway.url)
    client = socket.create_connection((str(address.hostname), address.port or 0), timeout=10)
    client.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    return client
