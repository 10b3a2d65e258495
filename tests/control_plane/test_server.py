"""The control plane as the process that users start."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.pool import NullPool

from control_plane import server
from parampara.db import migrate
from parampara.db.models import Job, Run
from parampara.db.session import make_sessions, transaction
from parampara.errors import Unavailable
from parampara.settings import DatabaseSettings, Settings
from tests.conftest import Postgres, free_port


@pytest.fixture
def environment(postgres: Postgres, redis_url: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Environment of a server whose database is empty: not even migrated."""
    name = f"serve_{uuid.uuid4().hex}"
    postgres.execute(f"CREATE DATABASE {name}")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    yield {
        **os.environ,
        "PARAMPARA_HOME": str(tmp_path / "home"),
        "PARAMPARA_DATABASE__URL": postgres.url(name),
        "PARAMPARA_REDIS__URL": redis_url,
        "PARAMPARA_BASE_MODELS": f'{{"tiny-llama": "{base}"}}',
        "PARAMPARA_CONTROL_PLANE__PORT": str(free_port()),
    }
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Process:
    def __init__(self, environment: dict[str, str], log: Path, *options: str) -> None:
        self.log = log
        self.url = f"http://127.0.0.1:{environment['PARAMPARA_CONTROL_PLANE__PORT']}"
        self.key_file = Path(environment["PARAMPARA_HOME"]) / "api-key"
        command = [sys.executable, "-m", "control_plane", "serve", *options]
        self.process = subprocess.Popen(command, env=environment, stderr=log.open("ab"))

    def client(self) -> httpx.Client:
        deadline = time.monotonic() + 40
        while True:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return httpx.Client(
                        base_url=self.url, headers={"Authorization": f"Bearer {self.key_file.read_text().strip()}"}, timeout=20
                    )
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)


@pytest.fixture
def served(environment: dict[str, str], tmp_path: Path) -> Iterator[Process]:
    process = Process(environment, tmp_path / "log")
    yield process
    if process.process.poll() is None:
        process.stop(signal.SIGKILL)


def _run_body(client: httpx.Client) -> dict[str, Any]:
    rows = b"".join(b'{"question": "%d?", "answer": "%d"}\n' % (number, number) for number in range(4))
    ids = [
        client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"}).json()["id"]
        for name, content in (("book.txt", b"A book.\n" * 50), ("qa.jsonl", rows))
    ]
    return {"recipe": {"name": "tiny", "base_model": "tiny-llama"}, "datasets": {"books": ids[:1], "qa": ids[1:]}}


def test_an_accepted_run_survives_kill_9(served: Process, environment: dict[str, str], tmp_path: Path) -> None:
    client = served.client()
    accepted = client.post("/v1/runs", json=_run_body(client), headers={"Idempotency-Key": "once"})
    assert accepted.status_code == 202
    served.stop(signal.SIGKILL)

    engine = create_engine(environment["PARAMPARA_DATABASE__URL"], poolclass=NullPool)
    with transaction(make_sessions(engine)) as session:
        assert session.scalars(select(Run.id)).all() == [accepted.json()["id"]]
        assert len(session.scalars(select(Job.id)).all()) == 7
    engine.dispose()

    again = Process(environment, tmp_path / "log2")
    try:
        run = again.client().get(f"/v1/runs/{accepted.json()['id']}").json()
        assert run["jobs"][0]["status"] == "queued"
    finally:
        assert again.stop(signal.SIGTERM) == 0


def test_sigterm_ends_it_at_once_although_a_stream_is_open(served: Process) -> None:
    client = served.client()
    run_id = client.post("/v1/runs", json=_run_body(client)).json()["id"]
    with client.stream("GET", f"/v1/runs/{run_id}/events/stream") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: state"
        started = time.monotonic()
        assert served.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 8
        list(lines)
    key = served.key_file.read_text().strip()
    log = served.log.read_text()
    assert '"route": "/v1/runs"' in log
    assert '"request_id": "req_' in log
    assert key not in log


def test_without_migrating_it_waits_for_a_database_that_is_ready(environment: dict[str, str], tmp_path: Path) -> None:
    late = Process(environment, tmp_path / "log", "--no-migrate")
    try:
        deadline = time.monotonic() + 60
        while "waiting for the database" not in late.log.read_text():
            assert late.process.poll() is None, late.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        migrate.upgrade(environment["PARAMPARA_DATABASE__URL"])
        assert late.client().get("/v1/runs").status_code == 200
        assert "Traceback" not in late.log.read_text()
    finally:
        late.stop(signal.SIGTERM)


@pytest.mark.parametrize("option", ["--no-migrate", None])
def test_a_database_that_does_not_come_is_named_without_a_traceback(
    option: str | None, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_DATABASE_WAIT_SECONDS", 0)
    monkeypatch.setattr(server, "configure_logging", lambda *_, **__: None)
    settings = Settings(
        home=tmp_path / "home",
        database=DatabaseSettings(url=environment["PARAMPARA_DATABASE__URL"].replace("serve_", "none_")),
        log_format="console",
    )
    with pytest.raises(Unavailable, match=r"does not answer .*PARAMPARA_DATABASE__URL right"):
        server.serve(settings, host="127.0.0.1", port=0, migrate_first=option is None)


def test_unsent_doorbells_are_sent_by_the_reconciler(served: Process, environment: dict[str, str]) -> None:
    client = served.client()
    run_id = client.post("/v1/runs", json=_run_body(client)).json()["id"]
    engine = create_engine(environment["PARAMPARA_DATABASE__URL"], poolclass=NullPool)
    deadline = time.monotonic() + 10
    with engine.begin() as connection:
        connection.execute(text("UPDATE outbox SET sent_at = NULL"))
    while True:
        with engine.connect() as connection:
            if connection.execute(text("SELECT count(*) FROM outbox WHERE sent_at IS NULL")).scalar_one() == 0:
                break
        assert time.monotonic() < deadline, f"the doorbell of {run_id} was never rung"
        time.sleep(0.1)
    engine.dispose()


def test_metrics_need_a_key_but_on_a_port_of_their_own(environment: dict[str, str], tmp_path: Path) -> None:
    metrics_port = free_port()
    process = Process({**environment, "PARAMPARA_CONTROL_PLANE__METRICS_PORT": str(metrics_port)}, tmp_path / "log")
    try:
        with process.client() as client:
            assert httpx.get(f"{process.url}/metrics").status_code == 401
            for text in (client.get("/metrics").text, httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text):
                assert 'parampara_jobs{kind="dapt",state="queued"} 0.0' in text
                assert "parampara_http_requests_total" in text
    finally:
        assert process.stop(signal.SIGTERM) == 0


def test_a_taken_port_is_named_with_its_setting(environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", int(environment["PARAMPARA_CONTROL_PLANE__PORT"]))):
        refused = subprocess.run(
            [sys.executable, "-m", "control_plane", "serve"], env=environment, capture_output=True, text=True, timeout=40, check=False
        )
    assert refused.returncode != 0
    assert environment["PARAMPARA_CONTROL_PLANE__PORT"] in refused.stderr
    assert "PARAMPARA_CONTROL_PLANE__PORT" in refused.stderr
    assert "Traceback" not in refused.stderr
