"""Keys: default deny on every route, scopes, and an administrator who can not lock everybody out."""

from __future__ import annotations

import logging
import re
import stat
import threading
import time
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi.testclient import TestClient
from sqlalchemy import select, text
from sqlalchemy.orm import Session, sessionmaker

from control_plane.auth import PUBLIC_PATHS
from control_plane.server import prepare
from parampara.db.models import ApiKey
from parampara.db.session import transaction
from parampara.errors import ParamparaError
from parampara.http import DOCS_PATHS
from parampara.keys import new_key, read_pepper, well_formed
from parampara.settings import Settings


def routes_of(app: FastAPI) -> list[tuple[str, str]]:
    """Method and path of every route that the application answers, whether it is in the schema or not."""
    found = []
    for route in iter_route_contexts(app.routes):
        found += [(method, str(route.path).replace(":path}", "}")) for method in sorted(route.methods or ()) if method != "HEAD"]
    return found


def test_every_route_without_a_key_is_a_401(app: FastAPI) -> None:
    routes = routes_of(app)
    documented = {(method.upper(), path) for path, methods in app.openapi()["paths"].items() for method in methods}
    assert documented <= set(routes)
    assert len(routes) > 30
    with TestClient(app, raise_server_exceptions=False) as anonymous:
        for method, path in routes:
            answer = anonymous.request(method, re.sub(r"\{[^}]*\}", "x", path))
            if path in PUBLIC_PATHS:
                assert answer.status_code != 401, (method, path)
                continue
            assert answer.status_code == 401, (method, path, answer.status_code)
            assert answer.json()["error"]["code"] == "missing_api_key"
            assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_what_is_public_is_only_health_and_docs(app: FastAPI) -> None:
    public = {path for _, path in routes_of(app) if path in PUBLIC_PATHS}
    assert public == {"/health", "/livez", "/readyz"} | DOCS_PATHS


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Basic YTpi",
        "Bearer sk-123",
        pytest.param(f"Bearer {new_key()}", id="well-formed"),
        "Bearer " + "x" * 5000,
        "pp_without_scheme",
        "Bearer \u00e9",
    ],
)
def test_a_wrong_key_is_a_401(app: FastAPI, header: str) -> None:
    with TestClient(app, raise_server_exceptions=False) as stranger:
        answer = stranger.get("/v1/files", headers={b"Authorization": header.encode("latin-1")})
        assert answer.status_code == 401
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_urls_tell_a_stranger_nothing(app: FastAPI) -> None:
    with TestClient(app) as stranger:
        assert stranger.get("/v1/secret").status_code == 401
        assert stranger.get("/docs/../v1/files").status_code == 401
        assert stranger.get("//v1/files").status_code == 401


def test_the_first_key_is_private_and_kept(app: FastAPI, plane_settings: Settings, sessions: sessionmaker[Session]) -> None:
    path = plane_settings.home / "api-key"
    key = path.read_text().strip()
    assert well_formed(key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((plane_settings.home / "key-pepper").stat().st_mode) == 0o600
    prepare(plane_settings, sessions)
    assert path.read_text().strip() == key
    with transaction(sessions) as session:
        rows = session.scalars(select(ApiKey)).all()
        assert [row.scopes for row in rows] == [["admin"]]
        dump = str(session.execute(text("SELECT * FROM api_keys")).all())
    assert key not in dump
    assert read_pepper(plane_settings).decode() not in dump


def test_the_key_is_adopted_by_a_new_database_and_never_logged(
    plane_settings: Settings, sessions: sessionmaker[Session], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.DEBUG):
        prepare(plane_settings, sessions)
        key = (plane_settings.home / "api-key").read_text().strip()
        with transaction(sessions) as session:
            session.execute(text("DELETE FROM api_keys"))
        prepare(plane_settings, sessions)
    with transaction(sessions) as session:
        assert session.scalars(select(ApiKey.scopes)).all() == [["admin"]]
    output = capfd.readouterr()
    assert key not in caplog.text + output.out + output.err


def test_a_damaged_key_file_stops_the_start(plane_settings: Settings, sessions: sessionmaker[Session]) -> None:
    plane_settings.home.mkdir(parents=True)
    (plane_settings.home / "api-key").write_text("nonsense")
    with pytest.raises(ParamparaError, match="Remove the file"):
        prepare(plane_settings, sessions)


def test_a_key_is_shown_once_and_works_until_revoked(client: TestClient, app: FastAPI) -> None:
    made = client.post("/v1/api_keys", json={"name": "notebook", "scopes": ["jobs"]})
    assert made.status_code == 201
    body = made.json()
    assert body["key"] not in client.get("/v1/api_keys").text
    assert body["hint"].split("...") == [body["key"][:7], body["key"][-4:]]
    with TestClient(app, headers={"Authorization": f"Bearer {body['key']}"}) as notebook:
        assert notebook.get("/v1/files").status_code == 200
        assert client.delete(f"/v1/api_keys/{body['id']}").json()["revoked_at"]
        assert notebook.get("/v1/files").status_code == 401
    assert client.delete(f"/v1/api_keys/{body['id']}").status_code == 200


@pytest.mark.parametrize(
    ("scopes", "allowed"), [(["jobs"], {"jobs"}), (["chat"], set()), (["admin"], {"jobs", "admin"}), (["chat", "jobs"], {"jobs"})]
)
def test_scopes_are_enforced(client: TestClient, app: FastAPI, scopes: list[str], allowed: set[str]) -> None:
    key = client.post("/v1/api_keys", json={"name": "k", "scopes": scopes}).json()["key"]
    needs = {"/v1/files": "jobs", "/v1/runs": "jobs", "/v1/jobs": "jobs", "/v1/artifacts": "jobs", "/v1/deployments": "jobs"}
    with TestClient(app, headers={"Authorization": f"Bearer {key}"}) as holder:
        for url, scope in {**needs, "/v1/aliases": "jobs", "/v1/api_keys": "admin"}.items():
            answer = holder.get(url)
            assert answer.status_code == (200 if scope in allowed else 403), url
            if scope not in allowed:
                assert answer.json()["error"]["code"] == "insufficient_permissions"
                assert scope in answer.json()["error"]["message"]


def test_the_last_administrator_stays(client: TestClient) -> None:
    first = client.get("/v1/api_keys").json()["data"][0]["id"]
    refused = client.delete(f"/v1/api_keys/{first}")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "wrong_state"
    client.post("/v1/api_keys", json={"name": "second", "scopes": ["admin"]})
    assert client.delete(f"/v1/api_keys/{first}").status_code == 200


def test_two_administrators_can_not_revoke_each_other_at_once(client: TestClient, app: FastAPI, sessions: sessionmaker[Session]) -> None:
    first = client.get("/v1/api_keys").json()["data"][0]["id"]
    second: dict[str, Any] = client.post("/v1/api_keys", json={"name": "second", "scopes": ["admin"]}).json()
    other = TestClient(app, headers={"Authorization": f"Bearer {second['key']}"}, raise_server_exceptions=False)
    threads = [
        threading.Thread(target=client.delete, args=(f"/v1/api_keys/{second['id']}",)),
        threading.Thread(target=other.delete, args=(f"/v1/api_keys/{first}",)),
    ]
    with transaction(sessions) as holder:  # both requests are inside, and neither has written
        holder.execute(text("SELECT * FROM api_keys FOR UPDATE"))
        for thread in threads:
            thread.start()
        _wait_for_blocked(sessions, 2)
    for thread in threads:
        thread.join()
    with transaction(sessions) as session:
        assert len(session.scalars(select(ApiKey).where(ApiKey.revoked_at.is_(None))).all()) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"name": "x"}, "scopes"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0"),
        ({"name": "x\n", "scopes": ["jobs"]}, "name"),
        ({"name": "x" * 81, "scopes": ["jobs"]}, "name"),
        ({"name": "x", "scopes": ["jobs"], "key": "mine"}, "key"),
        ([], None),
    ],
)
def test_a_bad_key_request_names_the_field(client: TestClient, body: Any, param: str | None) -> None:
    answer = client.post("/v1/api_keys", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def _wait_for_blocked(sessions: sessionmaker[Session], count: int) -> None:
    """Until so many statements on this database wait for a lock."""
    waiting = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'")
    deadline = time.monotonic() + 30
    while True:
        with sessions() as session:
            if session.execute(waiting).scalar_one() >= count:
                return
        assert time.monotonic() < deadline, "the requests never met"
        time.sleep(0.02)
