"""Artifacts and deployments: what a finished run leaves, and moving aliases between models."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import delete, update
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Alias, Artifact, Deployment, Model, Run, VectorStore
from parampara.db.session import transaction
from parampara.settings import Settings
from parampara.storage import LocalStorage
from tests.control_plane.line import claim_next, finish, work_through


@pytest.fixture
def finished(client: TestClient, run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings) -> dict[str, Any]:
    run_id = client.post("/v1/runs", json=run_body).json()["id"]
    work_through(sessions, plane_settings, run_id)
    return client.get(f"/v1/runs/{run_id}").json()


def _artifact(run: dict[str, Any], job: str) -> str:
    return next(artifact["id"] for artifact in run["artifacts"] if artifact["job"] == job)


def test_an_artifact_shows_its_manifest_and_parents(
    client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    parent, child = _artifact(finished, "merge"), _artifact(finished, "quantize")
    with transaction(sessions) as session:
        session.execute(update(Artifact).where(Artifact.id == child).values(parents=[parent]))
    artifact = client.get(f"/v1/artifacts/{child}").json()
    assert artifact["kind"] == "quantized_model"
    assert [file["path"] for file in artifact["files"]] == ["product.txt", "sub/more.txt"]
    assert artifact["versions"] == {"torch": "2.13.0"}
    assert [item["id"] for item in artifact["parent_artifacts"]] == [parent]
    assert {item["kind"] for item in client.get("/v1/artifacts?kind=adapter").json()["data"]} == {"adapter"}
    assert len(client.get("/v1/artifacts").json()["data"]) == 6
    assert LocalStorage(plane_settings.artifacts_dir).verify(child).is_dir()


def test_listed_files_are_downloaded_and_nothing_else(client: TestClient, finished: dict[str, Any], plane_settings: Settings) -> None:
    artifact_id = _artifact(finished, "merge")
    answer = client.get(f"/v1/artifacts/{artifact_id}/files/sub/more.txt")
    assert answer.content == b"more"
    files = client.get(f"/v1/artifacts/{artifact_id}").json()["files"]
    assert answer.headers["ETag"].strip('"') == files[1]["sha256"]
    place = LocalStorage(plane_settings.artifacts_dir).path(artifact_id)
    (place / "unlisted.txt").write_text("secret")
    (place / "product.txt").unlink()
    (place / "product.txt").symlink_to(plane_settings.home / "api-key")
    for path in (
        "unlisted.txt",
        "manifest.json",
        "../../../api-key",
        "..%2F..%2F..%2Fapi-key",
        "%2e%2e/%2e%2e/%2e%2e/api-key",
        "/etc/passwd",
        "sub/../product.txt",
        "sub",
        "product.txt",
        "product.txt%00",
    ):
        refused = client.get(f"/v1/artifacts/{artifact_id}/files/{path}")
        assert refused.status_code == 404, path
        assert "pp_" not in refused.text
    assert client.get("/v1/artifacts/sha256:0/files/x").status_code == 404


def test_a_model_is_deployed_by_name_and_the_alias_moves_when_it_answers(
    client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    answer = client.post("/v1/deployments", json={"model": finished["model"], "alias": "beta", "params": {"max_model_len": 512}})
    assert answer.status_code == 202, answer.text
    deployment = answer.json()
    assert (deployment["status"], deployment["alias"], deployment["active"]) == ("pending", "beta", False)
    assert deployment["live"] is None
    assert client.get("/v1/aliases/beta").json()["model"] is None
    job = client.get(f"/v1/jobs/{deployment['job_id']}").json()
    assert job["spec"]["params"]["max_model_len"] == 512
    assert job["spec"]["params"]["alias"] == "beta"
    claim = claim_next(sessions, "deploy")
    assert claim is not None
    finish(sessions, plane_settings, claim)
    ready = client.get(f"/v1/deployments/{deployment['id']}").json()
    assert (ready["status"], ready["active"], ready["url"]) == ("ready", True, "http://127.0.0.1:8002")
    assert ready["live"] == {"metrics": {"parity.live.top1": 0.99}, "gates": [], "decision": "promote", "not_measured": None}
    assert client.get("/v1/aliases/beta").json()["model"] == finished["model"]
    assert [item["id"] for item in client.get("/v1/deployments?alias=beta").json()["data"]] == [deployment["id"]]


def test_what_a_deployment_leaves_open_is_the_recipe_s(client: TestClient, finished: dict[str, Any]) -> None:
    recipe = client.get(f"/v1/runs/{finished['id']}").json()["recipe"]["stages"]["deploy"]
    changed = {"max_model_len": 512} if recipe["max_model_len"] != 512 else {"max_model_len": 256}
    for params, expected in (({}, {}), ({"params": changed}, changed)):
        made = client.post("/v1/deployments", json={"model": finished["model"], "alias": "beta", **params}).json()
        spec = client.get(f"/v1/jobs/{made['job_id']}").json()["spec"]["params"]
        assert spec == {**recipe, **expected, "alias": "beta"}


def test_an_artifact_that_has_no_model_yet_is_registered(
    client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session]
) -> None:
    artifact_id = _artifact(finished, "merge")
    answer = client.post("/v1/deployments", json={"artifact_id": artifact_id, "alias": "merged", "replace": True})
    assert answer.status_code == 202, answer.text
    assert answer.json()["model"] == f"ft:tiny-llama:parampara:expert:{artifact_id[7:19]}"
    by_model = client.post("/v1/deployments", json={"artifact_id": _artifact(finished, "quantize"), "alias": "kp"}).json()
    assert by_model["model"] == finished["model"]
    with transaction(sessions) as session:
        assert session.get_one(Model, answer.json()["model"]).run_id == finished["id"]


def test_a_second_alias_takes_the_model_server_only_when_told_to_and_the_first_is_then_served_no_more(
    client: TestClient, finished: dict[str, Any], run_body: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    body = {"artifact_id": _artifact(finished, "merge"), "alias": "second"}
    run_body["recipe"]["stages"]["deploy"]["alias"] = "second"
    for refused in (client.post("/v1/deployments", json=body), client.post("/v1/runs", json=run_body)):
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (400, "model_server_taken", "replace")
        assert "'kp'" in error["message"]
        assert finished["model"] in error["message"]
    run_body["recipe"]["stages"]["deploy"]["replace"] = True
    assert client.post("/v1/runs", json=run_body).status_code == 202
    made = client.post("/v1/deployments", json={**body, "replace": True})
    assert made.status_code == 202, made.text
    _deploy_next(sessions, plane_settings)
    served = {item["id"]: item["model"] for item in client.get("/v1/aliases").json()["data"]}
    assert served == {"kp": None, "second": made.json()["model"]}
    assert [item["status"] for item in client.get("/v1/deployments?alias=kp").json()["data"]] == ["superseded"]
    assert client.post("/v1/aliases/kp/rollback").json()["error"]["code"] == "model_server_taken"
    back = client.post("/v1/aliases/kp/rollback?replace=true")
    assert (back.status_code, back.json()["model"]) == (202, finished["model"])
    _deploy_next(sessions, plane_settings)
    assert client.get("/v1/aliases/second").json()["model"] is None


def _deploy_next(sessions: sessionmaker[Session], settings: Settings) -> None:
    claim = claim_next(sessions, "deploy")
    assert claim is not None
    finish(sessions, settings, claim)


def test_rollback_deploys_the_model_before(
    client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session], plane_settings: Settings
) -> None:
    assert client.post("/v1/aliases/kp/rollback").json()["error"]["code"] == "wrong_state"
    other = client.post("/v1/deployments", json={"artifact_id": _artifact(finished, "merge"), "alias": "kp"}).json()
    claim = claim_next(sessions, "deploy")
    assert claim is not None
    finish(sessions, plane_settings, claim)
    assert client.get("/v1/aliases/kp").json()["model"] == other["model"]
    back = client.post("/v1/aliases/kp/rollback")
    assert back.status_code == 202
    assert back.json()["model"] == finished["model"]
    claim = claim_next(sessions, "deploy")
    assert claim is not None
    finish(sessions, plane_settings, claim)
    assert client.get("/v1/aliases/kp").json()["model"] == finished["model"]
    statuses = [item["status"] for item in client.get("/v1/deployments?alias=kp&order=asc").json()["data"]]
    assert statuses == ["superseded", "superseded", "ready"]


def test_a_cancelled_deployment_leaves_the_alias_alone(
    client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session]
) -> None:
    before = client.get("/v1/aliases/kp").json()
    made = client.post("/v1/deployments", json={"artifact_id": _artifact(finished, "merge"), "alias": "kp"}).json()
    assert client.post(f"/v1/jobs/{made['job_id']}/cancel").status_code == 200
    assert client.get(f"/v1/deployments/{made['id']}").json()["status"] == "failed"
    after = client.get("/v1/aliases/kp").json()
    assert {**after, "updated_at": None} == {**before, "updated_at": None}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"alias": "kp"}, 400, None),
        ({"alias": "kp", "model": "m", "artifact_id": "a"}, 400, None),
        ({"alias": "kp", "model": "ft:none"}, 404, "model"),
        ({"alias": "kp", "artifact_id": "sha256:none"}, 404, "artifact_id"),
        ({"alias": "K P", "model": "ft:none"}, 400, "alias"),
        ({"alias": "kp", "model": "ft:none", "params": {"alias": "other"}}, 400, "params.alias"),
        ({"alias": "kp", "model": "ft:none", "params": {"colour": "red"}}, 400, "params.colour"),
        ({"alias": "kp", "model": "ft:none", "params": {"max_model_len": 1}}, 400, "params.max_model_len"),
    ],
)
def test_a_bad_deployment_is_refused(client: TestClient, body: dict[str, Any], status: int, param: str | None) -> None:
    answer = client.post("/v1/deployments", json=body)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param
    assert client.get("/v1/deployments").json()["data"] == []
    assert client.get("/v1/aliases").json()["data"] == []


def test_an_adapter_or_an_orphan_can_not_be_deployed(client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session]) -> None:
    adapter = client.post("/v1/deployments", json={"artifact_id": _artifact(finished, "dapt"), "alias": "kp"})
    assert (adapter.status_code, adapter.json()["error"]["param"]) == (400, "artifact_id")
    with transaction(sessions) as session:
        session.execute(delete(Deployment))
        session.execute(update(Alias).values(model=None))
        session.execute(delete(Model))
        session.execute(delete(Run))
    orphan = client.post("/v1/deployments", json={"artifact_id": _artifact(finished, "merge"), "alias": "kp"})
    assert (orphan.status_code, orphan.json()["error"]["param"]) == (400, "artifact_id")


def test_a_vector_store_is_attached_and_detached(client: TestClient, finished: dict[str, Any], sessions: sessionmaker[Session]) -> None:
    with transaction(sessions) as session:
        session.add(VectorStore(id="vs_1", name="books", embedding_model="mini", extra={}))
    assert client.post("/v1/aliases/kp", json={"vector_store_id": "vs_1"}).json()["vector_store_id"] == "vs_1"
    assert client.get("/v1/aliases").json()["data"][0]["vector_store_id"] == "vs_1"
    assert client.post("/v1/aliases/kp", json={"vector_store_id": None}).json()["vector_store_id"] is None
    unknown = client.post("/v1/aliases/kp", json={"vector_store_id": "vs_2"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "vector_store_id")
    assert client.post("/v1/aliases/kp", json={}).json()["error"]["code"] == "missing_required_parameter"
    assert client.post("/v1/aliases/none", json={"vector_store_id": None}).status_code == 404
