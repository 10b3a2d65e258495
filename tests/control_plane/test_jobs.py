"""Jobs: lists, and loss curves from the files and events that a stage leaves."""

from __future__ import annotations

import json
from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from control_plane.services.metrics import collect, thin
from parampara.db.models import Job
from parampara.db.session import transaction
from parampara.execution import leases
from parampara.execution.watch import ProgressBook
from parampara.progress import JsonlProgress
from parampara.settings import Settings
from tests.control_plane.line import claim_next


def test_jobs_are_listed_by_state_kind_and_run(client: TestClient, run_body: dict[str, Any]) -> None:
    first, second = (client.post("/v1/runs", json=run_body).json() for _ in range(2))
    assert len(client.get("/v1/jobs?limit=100").json()["data"]) == 14
    merges = client.get(f"/v1/jobs?kind=merge&run_id={first['id']}").json()["data"]
    assert {job["name"] for job in merges} == {"merge", "merge_dapt"}
    queued = client.get("/v1/jobs?status=queued&order=asc").json()["data"]
    assert [job["run_id"] for job in queued] == [first["id"], second["id"]]
    assert client.get("/v1/jobs?kind=cook").status_code == 400


def test_a_loss_curve_comes_from_the_progress_file(client: TestClient, run_body: dict[str, Any], plane_settings: Settings) -> None:
    job_id = client.post("/v1/runs", json=run_body).json()["jobs"][0]["id"]
    assert client.get(f"/v1/jobs/{job_id}/metrics").json() == {"object": "job.metrics", "job_id": job_id, "source": "none", "data": []}
    path = plane_settings.work_dir / job_id / "progress.jsonl"
    progress = JsonlProgress(path)
    progress.phase("load model")
    progress.phase("train")
    for step in range(1, 6):
        progress.step(step, 5, loss=5.0 - step, tokens_per_s=100.0)
    progress.step(4, 5, loss=0.5)  # resumed: step 4 came again
    progress.step(5, 5, loss=float("nan"))
    progress.step(5, 5, validation_loss=0.25)
    with path.open("a") as file:
        file.write('{"type": "step", "st')  # being written
    metrics = client.get(f"/v1/jobs/{job_id}/metrics").json()
    assert metrics["source"] == "progress"
    assert [point["step"] for point in metrics["data"]] == [1, 2, 3, 4, 5]
    assert metrics["data"][3]["metrics"] == {"loss": 0.5, "tokens_per_s": 100.0}
    assert metrics["data"][4]["metrics"] == {"loss": None, "tokens_per_s": 100.0, "validation_loss": 0.25}
    assert metrics["data"][0]["phase"] == "train"
    assert [point["step"] for point in client.get(f"/v1/jobs/{job_id}/metrics?points=2").json()["data"]] == [1, 5]


def test_a_loss_curve_comes_from_events_where_the_file_is_elsewhere(
    client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session]
) -> None:
    run = client.post("/v1/runs", json=run_body).json()
    claim = claim_next(sessions, "train")
    assert claim is not None
    book = ProgressBook({})
    flushes = [
        [("load model", 1, 3, {}), ("train", 1, 8, {"loss": 4.0}), ("train", 2, 8, {"loss": 3.0})],
        [("train", 2, 8, {"loss": 2.0}), ("validate", 1, 2, {"validation_loss": 2.5}), ("train", 2, 8, {"loss": 1.0})],
    ]
    phase = None
    for flush in flushes:
        for name, step, total, values in flush:
            if name != phase:
                phase = name
                book.fold({"type": "phase", "t": 0.0, "phase": name})
            book.fold({"type": "event", "t": 0.0, "message": "loss is low", "data": {"phase": "not one"}})
            book.fold({"type": "step", "t": 10.0 * step, "step": step, "total": total, "metrics": values})
        with transaction(sessions) as session:
            assert leases.record(session, claim, progress={**book.progress, "eta_seconds": 12.5}, events=book.pending()).alive
        book.written()
    metrics = client.get(f"/v1/jobs/{claim.job_id}/metrics").json()
    assert metrics["source"] == "events"
    assert [(point["phase"], point["step"], point["total"], point["metrics"]) for point in metrics["data"]] == [
        ("load model", 1, 3, {}),
        ("train", 1, 8, {"loss": 4.0}),
        ("train", 2, 8, {"loss": 1.0}),
        ("validate", 1, 2, {"validation_loss": 2.5}),
    ]
    job = client.get(f"/v1/jobs/{claim.job_id}").json()
    assert job["progress"] == {"phase": "train", "step": 2, "total": 8, "metrics": {"loss": 1.0}}
    assert job["eta_seconds"] == 12.5
    run = client.get(f"/v1/runs/{run['id']}").json()
    assert run["stage"] == "dapt"
    assert run["progress"] == (2 / 8) / 7
    assert run["eta_seconds"] is None  # nobody knows yet how long the later stages take


def test_a_reused_job_shows_the_curve_of_its_source(
    client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    job_id = client.post("/v1/runs", json=run_body).json()["jobs"][0]["id"]
    JsonlProgress(plane_settings.work_dir / "job_source" / "progress.jsonl").step(1, 1, loss=2.0)
    with transaction(sessions) as session:
        session.get_one(Job, job_id).reused_from = "job_source"
    assert client.get(f"/v1/jobs/{job_id}/metrics").json()["data"][0]["metrics"] == {"loss": 2.0}


def test_odd_records_are_passed_over() -> None:
    records: list[dict[str, Any]] = [{"type": "step"}, {"type": "step", "step": "x"}, {}, {"type": "step", "step": 1, "metrics": None}]
    assert [point.step for point in collect(records)] == [1]
    assert [point.step for point in thin(collect([json.loads(f'{{"type": "step", "step": {n}}}') for n in range(100)]), 5)] == [
        0,
        25,
        50,
        74,
        99,
    ]
