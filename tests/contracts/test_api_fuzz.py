"""Property: whatever is sent to the control plane, no answer is a 5xx and every refusal has the error shape."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session, sessionmaker

from control_plane.app import create_app
from control_plane.server import prepare
from parampara.settings import Settings

_TEXT = st.text(st.characters(), max_size=30) | st.sampled_from(
    ["", "\x00", "\ud800", "../../etc/passwd", "file-" + "0" * 24, "kp", "-1", "1e999"]
)
_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)
_KEYS = (
    "recipe",
    "recipe_yaml",
    "datasets",
    "name",
    "metadata",
    "reuse",
    "model",
    "alias",
    "artifact_id",
    "params",
    "vector_store_id",
    "scopes",
)
_BODY = st.dictionaries(st.sampled_from(_KEYS), _VALUE, max_size=6) | _VALUE
_SEGMENT = st.text(string.ascii_letters + string.digits + "%._-~:", min_size=1, max_size=20) | st.sampled_from(
    ["%00", "%2e%2e", "%ff", "x" * 500]
)
_QUERY = st.dictionaries(
    st.sampled_from(["after", "limit", "order", "status", "kind", "purpose", "alias", "points", "run_id"]), _TEXT, max_size=3
)


@pytest.fixture
def client(settings: Settings, sessions: sessionmaker[Session], tmp_path: Path) -> Any:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    configured = settings.model_copy(update={"base_models": {"tiny-llama": str(base)}})
    prepare(configured, sessions)
    key = (configured.home / "api-key").read_text().strip()
    app = create_app(configured, sessions)
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}, raise_server_exceptions=False) as client:
        client.routes = [(method, path) for path, methods in app.openapi()["paths"].items() for method in methods]  # type: ignore[attr-defined]
        yield client


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_no_input_gives_a_5xx(client: Any, data: st.DataObject) -> None:
    method, path = data.draw(st.sampled_from(client.routes))
    while "{" in path:
        start, end = path.index("{"), path.index("}")
        path = path[:start] + data.draw(_SEGMENT) + path[end + 1 :]
    query = {key: value.encode("utf-8", "surrogatepass").decode("latin-1") for key, value in data.draw(_QUERY).items()}
    body = data.draw(_BODY.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=100))
    kind = data.draw(
        st.sampled_from(["application/json", "multipart/form-data; boundary=b", "text/plain", "application/x-www-form-urlencoded"])
    )
    headers = {"Content-Type": kind, "Idempotency-Key": data.draw(st.sampled_from(["a", "b", "\x7f", ""])), "Last-Event-ID": "evt_0"}
    answer = client.request(method.upper(), path, params=query, content=body if method == "post" else None, headers=headers)
    assert answer.status_code < 500, (method, path, query, body, answer.text)
    if answer.status_code >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
