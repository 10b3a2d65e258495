"""The supervisor's routes and its memory, with a vLLM that cannot start."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from model_server.app import create_app
from parampara.settings import ModelServerSettings, Settings
from tests.conftest import free_port

BROKEN = [sys.executable, "-c", "raise ValueError('these weights are not for me')"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", model_server=ModelServerSettings(vllm_command=BROKEN, vllm_port=free_port(), cpu=True))


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 1}))
    return path


def body(model: Path, *, generation: int = 1, alias: str = "kp") -> dict:
    return {
        "artifact_id": "sha256:a",
        "model_path": str(model),
        "model_name": f"ft:tiny:org:{alias}:{generation}",
        "alias": alias,
        "generation": generation,
    }


def until(client: TestClient, status: str, seconds: float = 20) -> dict:
    deadline = time.monotonic() + seconds
    while (report := client.get("/deployment").json())["status"] != status:
        assert time.monotonic() < deadline, report
        time.sleep(0.05)
    return report


def test_a_model_that_cannot_start_is_reported_with_vllms_own_words(client: TestClient, model: Path) -> None:
    assert client.get("/deployment").json()["status"] == "stopped"
    assert client.put("/deployment", json=body(model)).status_code == 202
    report = until(client, "failed")
    assert "ValueError: these weights are not for me" in report["error"]
    assert "these weights" in report["log_tail"]
    assert report["generation"] == 1
    assert report["serving"] is None


def test_an_older_generation_is_refused_and_another_alias_has_its_own_count(client: TestClient, model: Path) -> None:
    assert client.put("/deployment", json=body(model, generation=5)).status_code == 202
    stale = client.put("/deployment", json=body(model, generation=4))
    assert stale.status_code == 400
    assert stale.json()["error"]["code"] == "stale_generation"
    assert client.put("/deployment", json=body(model, generation=1, alias="other")).status_code == 202


def test_generations_survive_a_restart(settings: Settings, model: Path) -> None:
    with TestClient(create_app(settings)) as client:
        client.put("/deployment", json=body(model, generation=9))
    with TestClient(create_app(settings)) as client:
        assert client.put("/deployment", json=body(model, generation=8)).json()["error"]["code"] == "stale_generation"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model_path": "/nowhere"}, "model_path"),
        ({"generation": -1}, "generation"),
        ({"surprise": 1}, "surprise"),
        ({"alias": None}, "alias"),
    ],
)
def test_bad_bodies_are_refused_by_name(client: TestClient, model: Path, change: dict, param: str) -> None:
    answer = client.put("/deployment", json={**body(model), **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert client.get("/deployment").json()["status"] == "stopped"


def test_probes_and_metrics_answer(client: TestClient) -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").json() == {"status": "ok", "deployment": "stopped"}
    assert "parampara_model_server_ready" in client.get("/metrics").text
    assert client.get("/nothing").json()["error"]["code"] == "unknown_url"


def test_delete_stops_wanting(client: TestClient, model: Path) -> None:
    client.put("/deployment", json=body(model))
    assert client.delete("/deployment").json()["status"] == "stopped"
