"""Runs: what is refused and how, what an accepted one is made of, and steering it."""

from __future__ import annotations

import base64
import copy
import json
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Job, Outbox, Run
from parampara.db.session import transaction
from parampara.settings import Settings
from tests.control_plane.conftest import QUESTIONS, Upload
from tests.control_plane.line import fail_next, work_through

LINE = ["dapt", "merge_dapt", "sft", "merge", "quantize", "evaluate", "deploy"]


def test_an_accepted_run_is_written_whole(client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session]) -> None:
    answer = client.post("/v1/runs", json={**run_body, "metadata": {"team": "kp"}, "name": "first try"})
    assert answer.status_code == 202, answer.text
    run = answer.json()
    assert answer.headers["Location"] == f"/v1/runs/{run['id']}"
    assert (run["object"], run["status"], run["name"], run["alias"]) == ("run", "queued", "first try", "kp")
    assert run["metadata"] == {"team": "kp"}
    assert [job["name"] for job in run["jobs"]] == LINE
    assert [job["status"] for job in run["jobs"]] == ["queued"] + ["waiting"] * 6
    assert run["recipe"]["stages"]["dapt"]["lora"]["r"] == 16  # defaults are filled in
    assert run["progress"] == 0
    with transaction(sessions) as session:
        assert session.scalars(select(Job.name).where(Job.run_id == run["id"]).order_by(Job.position)).all() == LINE
        assert session.scalar(select(func.count()).select_from(Outbox)) == 1
    assert client.get(f"/v1/runs/{run['id']}").json() == run


PAIRS = [{"question": f"Who rules star {number}?", "chosen": "Ketu", "rejected": "Venus"} for number in range(3)]


def test_a_run_with_preferences_has_the_stages_that_learn_them(client: TestClient, run_body: dict[str, Any], upload: Upload) -> None:
    pairs = upload("".join(json.dumps(row) + "\n" for row in PAIRS).encode(), "pairs.jsonl")
    body = _with(_with(run_body, "recipe.stages.dpo", {"beta": 0.2}), "datasets.preferences", [pairs])
    answer = client.post("/v1/runs", json=body)
    assert answer.status_code == 202, answer.text
    run = answer.json()
    assert [job["name"] for job in run["jobs"]] == [*LINE[:3], "merge_sft", "dpo", *LINE[3:]]
    assert (run["jobs"][4]["kind"], run["jobs"][4]["queue"]) == ("dpo", "train")
    assert (run["datasets"]["preferences"], run["datasets"]["preferences_validation"]) == ([pairs], [])
    refused = client.delete(f"/v1/files/{pairs}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "wrong_state")


def test_preferences_without_the_stage_and_the_stage_without_preferences_are_refused(
    client: TestClient, run_body: dict[str, Any], upload: Upload
) -> None:
    pairs = upload("".join(json.dumps(row) + "\n" for row in PAIRS).encode(), "pairs.jsonl")
    for body, says in (
        (_with(run_body, "datasets.preferences", [pairs]), "Add `dpo: {}`"),
        (_with(run_body, "recipe.stages.dpo", {}), "give at least one file id"),
    ):
        answer = client.post("/v1/runs", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "datasets.preferences")
        assert says in answer.json()["error"]["message"]


def test_the_doorbell_carries_the_id_of_the_first_job(client: TestClient, run_body: dict[str, Any], redis_url: str) -> None:
    job_id = client.post("/v1/runs", json=run_body).json()["jobs"][0]["id"]
    with redis.Redis.from_url(redis_url) as broker:
        message = broker.blpop(["train"], timeout=10)
    assert message is not None
    assert json.loads(base64.b64decode(json.loads(message[1])["body"]))[0] == [job_id]


def test_a_run_is_accepted_while_the_broker_is_away(client: TestClient, run_body: dict[str, Any], redis_server: Any) -> None:
    redis_server.stop()
    answer = client.post("/v1/runs", json=run_body)
    assert answer.status_code == 202
    assert client.get(f"/v1/runs/{answer.json()['id']}").json()["jobs"][0]["status"] == "queued"


@pytest.mark.parametrize("name", ["kp-llama-3.1-8b.yaml", "tiny-cpu.yaml"])
def test_the_recipes_of_this_repository_are_accepted_as_text(
    client: TestClient, run_body: dict[str, Any], plane_settings: Settings, name: str
) -> None:
    text = (Path(__file__).parents[2] / "recipes" / name).read_text()
    base = yaml.safe_load(text)["base_model"]
    plane_settings.base_models[base] = plane_settings.base_models["tiny-llama"]
    answer = client.post("/v1/runs", json={"recipe_yaml": text, "datasets": run_body["datasets"]})
    assert answer.status_code == 202, answer.text


def _with(body: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(body)
    *parents, last = path.split(".")
    place = changed
    for part in parents:
        place = place.setdefault(part, {})
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("recipe.base_model", "gpt-9", "recipe.base_model"),
        ("recipe.base_model", "../../etc", "recipe.base_model"),
        ("recipe.base_model", 7, "recipe.base_model"),
        ("recipe.colour", "red", "recipe.colour"),
        ("recipe.stages.dapt.lora.r", "many", "recipe.stages.dapt.lora.r"),
        ("recipe.stages.dapt.lora.r", 0, "recipe.stages.dapt.lora.r"),
        ("recipe.stages.dapt.lora.rank", 8, "recipe.stages.dapt.lora.rank"),
        ("recipe.stages.sft.train.learning_rate", 20, "recipe.stages.sft.train.learning_rate"),
        ("recipe.stages", [], "recipe.stages"),
        ("recipe.stages.evaluate.judge", {"model": "grader"}, "recipe.stages.evaluate.judge"),  # no endpoint is configured here
        ("recipe.name", "Bad Name!", "recipe.name"),
        ("recipe.name", "x\u0000y", None),
        ("recipe.gates", [{"metric": "exact.sft"}], "recipe.gates.0"),
        ("recipe.gates", [{"metric": "exact.sft", "min": 2, "max": 1}], "recipe.gates.0"),
        ("recipe", "a string", "recipe"),
        ("recipe", None, "recipe"),
        ("recipe_yaml", "name: [", "recipe_yaml"),
        ("datasets.books", ["file-000000000000000000000000"], "datasets.books"),
        ("datasets.qa", ["../../api-key"], "datasets.qa"),
        ("datasets.qa_validation", ["file-000000000000000000000000"], "datasets.qa_validation"),
        ("datasets.qa", [], "datasets.qa"),
        ("datasets.qa", "file-1", "datasets.qa"),
        ("datasets.music", [], "datasets.music"),
        ("datasets", None, "datasets"),
        ("metadata", {"k": 1}, "metadata.k"),
        ("metadata", {"k" * 65: "v"}, None),
        ("metadata", {str(number): "v" for number in range(17)}, "metadata"),
        ("name", "x/y", "name"),
        ("colour", "red", "colour"),
        ("reuse", "perhaps", "reuse"),
    ],
)
def test_a_bad_request_is_refused_and_writes_nothing(
    client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], path: str, value: Any, param: str | None
) -> None:
    answer = client.post("/v1/runs", json=_with(run_body, path, value))
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
    named = (path.split(".")[-1], repr(value), "characters", "file")
    assert any(word in error["message"] for word in named), error["message"]
    with transaction(sessions) as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 0
        assert session.scalar(select(func.count()).select_from(Job)) == 0
        assert session.scalar(select(func.count()).select_from(Outbox)) == 0


@pytest.mark.parametrize(
    ("role", "filename", "content", "says"),
    [
        ("qa", "qa.jsonl", b"this is not JSON\n", "line"),
        ("qa", "qa.jsonl", b'{"colour": "red"}\n{"colour": "blue"}\n', "question"),
        ("qa", "qa.jsonl", b"\n\n", "row"),
        ("qa", "qa.jsonl", json.dumps(QUESTIONS[0]).encode(), "at least"),
        ("qa", "qa.jsonl", b'{"question": "\xff\xfe", "answer": "x"}\n', "UTF-8"),
        ("qa", "qa.jsonl", b'{"question": "a", "answer": ""}\n{"question": "b", "answer": ""}\n', "answer"),
        ("qa", "qa.jsonl", b'{"question": 3, "answer": []}\n' * 3, "question"),
        ("books", "book.txt", b"\xff\xfe\x00", "UTF-8"),
        ("books", "book.txt", b"   \n\n  ", "text"),
        ("books", "book.pdf", b"not a PDF", "PDF"),
        ("books", "book.epub", b"PK\x03\x04 broken", "EPUB"),
        ("books", "book.exe", b"MZ", "format"),
        ("books", "book.jsonl", b'{"txt": "wrong column"}\n', "text"),
        ("books_validation", "book.txt", b" ", "text"),
        ("qa_validation", "qa.jsonl", b"not JSON", "line"),
        ("preferences", "pairs.jsonl", json.dumps(PAIRS[0]).encode(), "at least"),
        ("preferences", "pairs.jsonl", json.dumps({**PAIRS[0], "chosen": "Venus"}).encode(), "line 1: the better answer and the worse one"),
        ("preferences", "pairs.jsonl", json.dumps(QUESTIONS[0]).encode(), "none of the accepted forms"),
        ("preferences", "pairs.jsonl", b"\n".join(json.dumps({**PAIRS[0], "rejected": x}).encode() for x in "ab"), "one question"),
    ],
)
def test_bad_data_is_a_400_that_names_field_file_and_rule(
    client: TestClient, run_body: dict[str, Any], upload: Upload, role: str, filename: str, content: bytes, says: str
) -> None:
    file_id = upload(content, filename, "user_data")
    body = _with(run_body, "recipe.stages.dpo", {}) if role == "preferences" else run_body
    answer = client.post("/v1/runs", json=_with(body, f"datasets.{role}", [file_id]))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == f"datasets.{role}"
    assert filename in error["message"]
    assert says.lower() in error["message"].lower()
    assert client.get("/v1/runs").json()["data"] == []


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: *a",
        "name: x\nname: y",
        "- a list",
        "name: '\\0'\nbase_model: \"\\0\"",
        "!!python/object/apply:os.system ['true']",
        "? [a, b]\n: c",
        "[" * 5000,
        "name: x\nbase_model: tiny-llama\n1: 2",
        "2026-01-01",
    ],
)
def test_hostile_yaml_is_a_400(client: TestClient, run_body: dict[str, Any], text: str) -> None:
    answer = client.post("/v1/runs", json={"recipe_yaml": text, "datasets": run_body["datasets"]})
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 3000


def test_both_forms_of_a_recipe_are_one_too_many(client: TestClient, run_body: dict[str, Any]) -> None:
    answer = client.post("/v1/runs", json={**run_body, "recipe_yaml": "name: x"})
    assert answer.json()["error"]["param"] == "recipe_yaml"


def test_the_same_key_and_body_make_one_run(client: TestClient, run_body: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "abc-1"}
    first = client.post("/v1/runs", json=run_body, headers=headers).json()
    assert client.post("/v1/runs", json=run_body, headers=headers).json()["id"] == first["id"]
    assert client.post("/v1/runs", json=run_body).json()["id"] != first["id"]
    other = client.post("/v1/runs", json={**run_body, "name": "other"}, headers=headers)
    assert other.status_code == 400
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    assert other.headers["X-Should-Retry"] == "false"
    assert len(client.get("/v1/runs").json()["data"]) == 2


def test_a_replay_is_answered_even_when_the_files_are_gone(client: TestClient, run_body: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "abc-2"}
    run_id = client.post("/v1/runs", json=run_body, headers=headers).json()["id"]
    client.post(f"/v1/runs/{run_id}/cancel")
    assert client.delete(f"/v1/files/{run_body['datasets']['qa'][0]}").status_code == 200
    again = client.post("/v1/runs", json=run_body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, run_id)


def test_clients_with_one_key_at_once_make_one_run(client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session]) -> None:
    answers: list[Any] = []
    start = threading.Barrier(6)

    def send() -> None:
        start.wait()
        answers.append(client.post("/v1/runs", json=run_body, headers={"Idempotency-Key": "at-once"}))

    threads = [threading.Thread(target=send) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    with transaction(sessions) as session:
        assert session.scalar(select(func.count()).select_from(Run)) == 1
        assert session.scalar(select(func.count()).select_from(Job)) == len(LINE)


@pytest.mark.parametrize("key", ["", "with space", "x" * 256])
def test_a_bad_idempotency_key_is_a_400(client: TestClient, run_body: dict[str, Any], key: str) -> None:
    answer = client.post("/v1/runs", json=run_body, headers={"Idempotency-Key": key})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"


def test_a_finished_run_shows_model_gates_and_artifacts(
    client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    run_id = client.post("/v1/runs", json=run_body).json()["id"]
    work_through(sessions, plane_settings, run_id)
    run = client.get(f"/v1/runs/{run_id}").json()
    assert (run["status"], run["gate"], run["progress"], run["eta_seconds"]) == ("succeeded", "promote", 1, None)
    assert run["model"].startswith("ft:tiny-llama:parampara:expert:")
    assert [artifact["job"] for artifact in run["artifacts"]] == LINE[:-1]
    assert run["gates"][0]["metric"] == "exact.sft"
    assert client.get("/v1/aliases/kp").json()["model"] == run["model"]


def test_time_left_is_known_from_earlier_runs_of_the_recipe(
    client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    first = client.post("/v1/runs", json=run_body).json()
    assert first["eta_seconds"] is None
    work_through(sessions, plane_settings, first["id"])
    with transaction(sessions) as session:
        for position, job in enumerate(session.scalars(select(Job).where(Job.run_id == first["id"]))):
            assert job.finished_at is not None
            job.started_at = job.finished_at - timedelta(seconds=10 + position)
    second = client.post("/v1/runs", json=run_body).json()
    assert second["eta_seconds"] == pytest.approx(sum(10 + position for position in range(7)))
    other = client.post("/v1/runs", json={**run_body, "recipe": {**run_body["recipe"], "name": "another"}}).json()
    assert other["eta_seconds"] is None


def test_a_walk_goes_on_when_its_last_object_has_left_the_list(client: TestClient, run_body: dict[str, Any]) -> None:
    made = [client.post("/v1/runs", json=run_body).json()["id"] for _ in range(4)]
    query = "/v1/runs?status=queued&order=asc&limit=2"
    page = client.get(query).json()
    assert client.post(f"/v1/runs/{page['last_id']}/cancel").json()["status"] == "cancelled"
    rest = client.get(f"{query}&after={page['last_id']}").json()
    assert [run["id"] for run in page["data"] + rest["data"]] == made


def test_runs_are_listed_in_pages(client: TestClient, run_body: dict[str, Any]) -> None:
    made = [client.post("/v1/runs", json=run_body).json()["id"] for _ in range(5)]
    walked, after = [], None
    while True:
        page = client.get("/v1/runs", params={"limit": 2, **({"after": after} if after else {})}).json()
        walked += [run["id"] for run in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert walked == made[::-1]
    client.post(f"/v1/runs/{made[0]}/cancel")
    assert [run["id"] for run in client.get("/v1/runs?status=cancelled").json()["data"]] == [made[0]]
    assert client.get("/v1/runs?after=run_none").status_code == 404
    assert client.get("/v1/runs?status=lost").status_code == 400


def test_cancel_and_retry(client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings) -> None:
    run_id = client.post("/v1/runs", json=run_body).json()["id"]
    assert client.post(f"/v1/runs/{run_id}/retry").json()["error"]["code"] == "wrong_state"
    cancelled = client.post(f"/v1/runs/{run_id}/cancel")
    assert cancelled.status_code == 200
    assert cancelled.json()["status"] == "cancelled"
    again = client.post(f"/v1/runs/{run_id}/cancel")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "wrong_state")
    retried = client.post(f"/v1/runs/{run_id}/retry").json()
    assert (retried["status"], retried["jobs"][0]["status"]) == ("queued", "queued")
    work_through(sessions, plane_settings, run_id)
    assert client.get(f"/v1/runs/{run_id}").json()["status"] == "succeeded"


def test_a_failed_job_is_shown_with_attempt_and_log_and_can_be_retried(
    client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    run = client.post("/v1/runs", json=run_body).json()
    fail_next(sessions, plane_settings, "train", message="the loss is not finite", code="diverged")
    job_id = run["jobs"][0]["id"]
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert (job["status"], job["error"]["code"]) == ("failed", "diverged")
    assert [(attempt["number"], attempt["status"], attempt["exit_code"]) for attempt in job["attempts"]] == [(1, "failed", 76)]
    assert "last words" in job["log_tail"]
    failed = client.get(f"/v1/runs/{run['id']}").json()
    assert failed["status"] == "failed"
    assert "not finite" in failed["error"]["message"]
    assert client.post(f"/v1/jobs/{job_id}/retry").json()["status"] == "queued"
    assert client.get(f"/v1/runs/{run['id']}").json()["status"] in ("queued", "running")
    work_through(sessions, plane_settings, run["id"])
    assert [attempt["status"] for attempt in client.get(f"/v1/jobs/{job_id}").json()["attempts"]] == ["failed", "succeeded"]


@pytest.mark.parametrize("url", ["/v1/runs/run_x", "/v1/runs/%00", "/v1/jobs/job_x", "/v1/jobs/job_x/metrics", "/v1/runs/run_x/events"])
def test_what_does_not_exist_is_a_404(client: TestClient, url: str) -> None:
    answer = client.get(url)
    assert answer.status_code in (400, 404)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_steering_what_does_not_exist_is_a_404(client: TestClient) -> None:
    for url in ("/v1/runs/run_x/cancel", "/v1/runs/run_x/retry", "/v1/jobs/job_x/cancel", "/v1/jobs/job_x/retry", "/v1/runs/job_1/cancel"):
        assert client.post(url).status_code == 404
