"""Probes, metrics and documentation: open to all, and honest about what is away."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from control_plane.app import create_app
from control_plane.server import serve_metrics
from parampara.db.session import make_engine, make_sessions, transaction
from parampara.keys import new_key
from parampara.settings import DatabaseSettings, Settings


def test_ready_means_reachable_and_migrated(client: TestClient, sessions: sessionmaker[Session]) -> None:
    assert client.get("/livez").json() == {"status": "ok"}
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert {name: check["ok"] for name, check in ready.json()["checks"].items()} == {"database": True, "redis": True}
    assert client.get("/health").json() == ready.json()
    with transaction(sessions) as session:
        session.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "parampara.db.migrate" in answer.json()["checks"]["database"]["detail"]


def test_probes_write_nothing_into_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    client.get("/readyz")
    with caplog.at_level("INFO"):
        client.get("/readyz")
    assert [record.name for record in caplog.records if record.name.startswith("alembic")] == []


def test_a_database_without_tables_is_not_ready(client: TestClient, sessions: sessionmaker[Session]) -> None:
    with transaction(sessions) as session:
        session.execute(text("DROP TABLE alembic_version"))
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert "schema None" in answer.json()["checks"]["database"]["detail"]


def test_ready_without_redis(client: TestClient, redis_server: Any) -> None:
    redis_server.stop()
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["checks"]["redis"]["ok"] is False


def test_without_its_database_it_lives_but_is_not_ready(plane_settings: Settings) -> None:
    away = DatabaseSettings(url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    engine = make_engine(away, application="test")
    app = create_app(plane_settings.model_copy(update={"database": away}), make_sessions(engine))
    with TestClient(app, raise_server_exceptions=False) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").json()["status"] == "not_ready"
        key = "Bearer " + (plane_settings.home / "key-pepper").read_text().strip()
        assert client.get("/v1/files", headers={"Authorization": key}).status_code == 401
        answer = client.get("/v1/files", headers={"Authorization": f"Bearer {new_key()}"})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "database_unavailable"
    assert answer.headers["Retry-After"]
    engine.dispose()


def test_metrics_count_requests_by_route_and_jobs_by_state(client: TestClient, run_body: dict[str, Any]) -> None:
    run_id = client.post("/v1/runs", json=run_body).json()["id"]
    client.get(f"/v1/runs/{run_id}")
    client.get("/v1/runs/run_none")
    client.get("/v1/nothing")
    metrics = client.get("/metrics").text
    label = 'method="GET",route="/v1/runs/{run_id}",service="control_plane"'
    assert f'parampara_http_requests_total{{{label},status="200"}}' in metrics
    assert f'parampara_http_requests_total{{{label},status="404"}}' in metrics
    assert f"parampara_http_request_seconds_count{{{label}}}" in metrics
    assert 'route="unmatched"' in metrics
    assert 'parampara_runs{state="queued"} 1.0' in metrics
    assert 'parampara_jobs{kind="dapt",state="queued"} 1.0' in metrics
    assert 'parampara_jobs{kind="merge",state="waiting"} 2.0' in metrics
    assert 'parampara_jobs{kind="ingest",state="failed"} 0.0' in metrics
    assert run_id not in metrics


def test_metrics_tell_the_room_left_even_without_a_database(plane_settings: Settings) -> None:
    away = DatabaseSettings(url="postgresql+psycopg://nobody@127.0.0.1:1/none")
    engine = make_engine(away, application="test")
    plane_settings.artifacts_dir.mkdir(parents=True)
    server = serve_metrics(plane_settings, make_sessions(engine), 0)
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_address[1]}") as stranger:
        metrics = stranger.get("/metrics").text
    server.shutdown()
    server.server_close()
    engine.dispose()
    told = dict(re.findall(r'^parampara_disk_(free|size)_bytes\{folder="artifacts"\} (\S+)$', metrics, re.MULTILINE))
    assert 0 < float(told["free"]) <= float(told["size"])
    assert "parampara_jobs{" not in metrics


def test_the_documentation_describes_every_route(client: TestClient) -> None:
    assert "swagger" in client.get("/docs").text
    schema = client.get("/openapi.json").json()
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            assert operation["summary"], (method, path)
            if path.startswith("/v1/"):
                assert operation["security"], (method, path)
                assert operation["responses"]["401"]["content"]["application/json"]["schema"]["$ref"].endswith("ErrorBody")
                assert "422" not in operation["responses"]  # invalid input is a 400 here
    assert schema["components"]["schemas"]["ErrorBody"]["properties"]["error"]["$ref"] == "#/components/schemas/ErrorDetail"
    form = schema["paths"]["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file", "purpose"]
    assert schema["components"]["schemas"]["RunCreate"]["examples"]


@pytest.mark.parametrize("path", ["/readyz", "/metrics", "/livez"])
def test_probes_refuse_writes(client: TestClient, path: str) -> None:
    refused = client.post(path)
    assert refused.status_code == 405
    assert refused.json()["error"]["code"] == "method_not_allowed"
