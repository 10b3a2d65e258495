"""The contract of every HTTP answer: OpenAI's error object on every status, a request id, and never a 5xx for bad input."""

from __future__ import annotations

import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from parampara.errors import Forbidden, NotFound, ParamparaError, RateLimited, Unavailable, UpstreamFailed
from parampara.http import install_error_handlers
from tests.contracts.servers import served


def _error(answer: Any) -> dict[str, Any]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert answer.headers["X-Request-Id"]
    assert answer.headers["Content-Type"] == "application/json"
    return error


@pytest.fixture
def small() -> FastAPI:
    """An application with one route per kind of failure."""
    app = FastAPI(title="small")
    raised: dict[str, Exception] = {
        "ours": NotFound("no such thing", param="thing"),
        "forbidden": Forbidden("not yours"),
        "limited": RateLimited("slow down"),
        "away": Unavailable("come back"),
        "upstream": UpstreamFailed("it broke"),
        "base": ParamparaError("bad"),
        "http": HTTPException(418, "a teapot"),
        "bug": RuntimeError("password=hunter2"),
    }

    @app.get("/raise/{kind}")
    def fail(kind: str) -> None:
        raise raised[kind]

    @app.post("/echo")
    def echo(body: dict[str, int]) -> dict[str, int]:
        return body

    install_error_handlers(app, max_body_bytes=1000, larger_bodies={"/big": 5000})
    return app


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("ours", 404, "not_found"),
        ("forbidden", 403, "insufficient_permissions"),
        ("limited", 429, "rate_limit_exceeded"),
        ("away", 503, "service_unavailable"),
        ("upstream", 502, "upstream_error"),
        ("base", 500, "internal_error"),
        ("http", 418, "invalid_request"),
        ("bug", 500, "internal_error"),
    ],
)
def test_every_exception_has_the_shape(small: FastAPI, kind: str, status: int, code: str) -> None:
    answer = TestClient(small, raise_server_exceptions=False).get(f"/raise/{kind}")
    assert answer.status_code == status
    assert _error(answer)["code"] == code
    assert "hunter2" not in answer.text
    assert ("Retry-After" in answer.headers) == (status in (429, 503))
    assert (answer.headers.get("X-Should-Retry") == "false") == (400 <= status < 500 and status != 429)


def test_fastapis_own_answers_have_the_shape(small: FastAPI) -> None:
    client = TestClient(small)
    unknown = client.get("/nothing")
    assert (unknown.status_code, _error(unknown)["code"]) == (404, "unknown_url")
    method = client.delete("/echo")
    assert (method.status_code, _error(method)["code"]) == (405, "method_not_allowed")
    assert method.headers["Allow"] == "POST"
    for body, code in (
        (b"{", "invalid_json"),
        (b'{"a": "x"}', "invalid_value"),
        (b"", "missing_required_parameter"),
        (b"\xff", "invalid_body"),
    ):
        answer = client.post("/echo", content=body, headers={"Content-Type": "application/json"})
        assert (answer.status_code, _error(answer)["code"]) == (400, code)
    deep = client.post("/echo", content=b"[" * 450 + b"]" * 450, headers={"Content-Type": "application/json"})
    assert deep.status_code == 400
    assert len(deep.text) < 600


def test_bodies_over_the_limit_are_refused_declared_or_not(small: FastAPI) -> None:
    client = TestClient(small)
    declared = client.post("/echo", content=b"x" * 1001, headers={"Content-Type": "application/json"})
    chunked = client.post("/echo", content=iter([b"x" * 600] * 2), headers={"Content-Type": "application/json"})
    for answer in (declared, chunked):
        assert (answer.status_code, _error(answer)["code"]) == (413, "payload_too_large")
        assert "1000 bytes" in answer.text
    assert client.post("/big", content=b"x" * 4000).status_code == 404


def test_a_request_id_is_kept_when_it_is_one(small: FastAPI) -> None:
    client = TestClient(small)
    assert client.get("/nothing", headers={"X-Request-Id": "abc-1"}).headers["X-Request-Id"] == "abc-1"
    for odd in ("a b", "x" * 200, "<script>"):
        assert client.get("/nothing", headers={"X-Request-Id": odd}).headers["X-Request-Id"].startswith("req_")


def test_a_body_that_stops_arriving_is_a_408() -> None:
    app = FastAPI(title="slow")

    @app.post("/echo")
    def echo(body: dict[str, int]) -> dict[str, int]:
        return body

    install_error_handlers(app, slow_body_seconds=0.3)
    with served(app) as base_url:
        address = urlsplit(base_url)
        with socket.create_connection((address.hostname or "", address.port or 0), timeout=10) as connection:
            connection.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            started = time.monotonic()
            answer = b""
            while b"request_timeout" not in answer and (more := connection.recv(65_536)):  # head and body may come apart
                answer += more
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer
    assert time.monotonic() - started < 5


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.one_of(st.binary(max_size=200), _JSON.map(lambda value: json.dumps(value).encode())))
def test_no_body_gives_a_5xx(small: FastAPI, body: bytes) -> None:
    answer = TestClient(small, raise_server_exceptions=False).post("/echo", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    if answer.status_code == 400:
        _error(answer)
