"""The control plane on a real database: in process, and behind a real uvicorn on a free port."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from control_plane.app import create_app
from control_plane.server import Server, prepare
from parampara.settings import Settings

QUESTIONS = [
    {"question": f"Which planet rules nakshatra number {number}?", "answer": f"Answer: lord {number}\nRule: order\nConfidence: High"}
    for number in range(1, 9)
]


# one line a record: the default prints every local variable of a traceback
structlog.configure(
    processors=[structlog.contextvars.merge_contextvars, structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()]
)


@pytest.fixture
def plane_settings(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with one base model directory in the catalogue and a small upload limit."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return settings.model_copy(update={"base_models": {"tiny-llama": str(base)}, "max_upload_bytes": 2_000_000})


@pytest.fixture
def app(plane_settings: Settings, sessions: sessionmaker[Session]) -> FastAPI:
    prepare(plane_settings, sessions)
    return create_app(plane_settings, sessions)


@pytest.fixture
def admin_key(app: FastAPI, plane_settings: Settings) -> str:
    return (plane_settings.home / "api-key").read_text().strip()


@pytest.fixture
def client(app: FastAPI, admin_key: str) -> Iterator[TestClient]:
    """Sends the administrator's key; server errors come back as answers, as over the wire."""
    with TestClient(app, headers={"Authorization": f"Bearer {admin_key}"}, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def base_url(app: FastAPI) -> Iterator[str]:
    """The same application behind a real uvicorn."""
    server = Server(app, host="127.0.0.1", port=0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "uvicorn did not start"
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    app.state.stopping = server.should_exit = True
    thread.join(20)
    assert not thread.is_alive(), "uvicorn did not stop"


Upload = Callable[..., str]


@pytest.fixture
def upload(client: TestClient) -> Upload:
    """Upload bytes and return the file's id."""

    def send(content: bytes, filename: str = "qa.jsonl", purpose: str = "fine-tune") -> str:
        answer = client.post("/v1/files", files={"file": (filename, content)}, data={"purpose": purpose})
        assert answer.status_code == 200, answer.text
        return answer.json()["id"]

    return send


@pytest.fixture
def run_body(upload: Upload) -> dict[str, Any]:
    """A request that makes a run."""
    book = upload(b"The nakshatras are twenty-seven.\n\n" * 200, "book.txt", "user_data")
    qa = upload("".join(json.dumps(row) + "\n" for row in QUESTIONS).encode())
    recipe = {"name": "kp-tiny", "base_model": "tiny-llama", "stages": {"deploy": {"alias": "kp"}}}
    return {"recipe": recipe, "datasets": {"books": [book], "qa": [qa]}}


def stored(settings: Settings) -> list[str]:
    """Names of everything in the folder of uploads."""
    return sorted(path.name for path in settings.files_dir.iterdir())
