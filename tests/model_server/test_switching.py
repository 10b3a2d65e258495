"""What happens when something else is wanted while a model is starting, and when two aliases want the same one."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from model_server.app import create_app
from model_server.deploy import run
from parampara.errors import InvalidRequest
from parampara.progress import SilentProgress
from parampara.schemas.stages import DeployConfig, DeployParams
from parampara.settings import ModelServerSettings, Settings
from tests.conftest import free_port
from tests.contracts.servers import served

VLLM = [sys.executable, str(Path(__file__).with_name("scripted_vllm.py"))]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    server = ModelServerSettings(vllm_command=VLLM, vllm_port=free_port(), cpu=True)
    with TestClient(create_app(Settings(home=tmp_path / "home", model_server=server))) as client:
        yield client


def make_model(tmp_path: Path, name: str, *, hold: bool = False) -> Path:
    path = tmp_path / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "hidden_size": 64, "num_hidden_layers": 1}))
    if hold:
        (path / "hold").touch()
    return path


def put(client: TestClient, model: Path, *, alias: str = "kp", generation: int = 1, **params: object) -> dict:
    body = {"artifact_id": f"sha256:{model.name}", "model_path": str(model), "model_name": f"ft:tiny:{model.name}", "alias": alias}
    answer = client.put("/deployment", json={**body, "generation": generation, "params": {"alias": alias, **params}})
    assert answer.status_code == 202, answer.text
    return answer.json()


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def ready(client: TestClient, model: Path) -> Callable[[], bool]:
    def check() -> bool:
        report = client.get("/deployment").json()
        return report["status"] == "ready" and report["serving"] == f"ft:tiny:{model.name}"

    return check


def test_an_answer_of_the_model_before_does_not_make_the_new_one_ready(client: TestClient, tmp_path: Path) -> None:
    old, new = make_model(tmp_path, "old", hold=True), make_model(tmp_path, "new", hold=True)
    put(client, old)
    until((old / "asked").exists)
    put(client, new, generation=2)
    (old / "hold").unlink()
    seen = set()

    def new_is_asked() -> bool:
        seen.add(client.get("/deployment").json()["status"])
        return (new / "asked").exists()

    until(new_is_asked)
    assert seen == {"starting"}
    (new / "hold").unlink()
    until(ready(client, new))
    assert client.get("/deployment").json()["first_answer"] == "I am ft:tiny:new"


def test_a_second_alias_for_the_model_that_is_served_starts_nothing(client: TestClient, tmp_path: Path) -> None:
    model = make_model(tmp_path, "model")
    put(client, model)
    until(ready(client, model))
    report = put(client, model, alias="second", generation=7, ready_timeout_seconds=60)
    assert (report["status"], report["alias"], report["generation"], report["serving"]) == ("ready", "second", 7, "ft:tiny:model")
    put(client, model, generation=2)
    assert (model / "started").read_text().count("\n") == 1
    put(client, model, generation=3, max_model_len=512)
    until(lambda: (model / "started").read_text().count("\n") == 2)
    until(ready(client, model))


def test_a_second_alias_while_the_model_still_loads_waits_for_the_same_start(client: TestClient, tmp_path: Path) -> None:
    model = make_model(tmp_path, "model", hold=True)
    put(client, model)
    until((model / "asked").exists)
    assert put(client, model, alias="second")["status"] == "starting"
    (model / "hold").unlink()
    until(ready(client, model))
    assert (model / "started").read_text().count("\n") == 1


def trial(client: TestClient, model: Path, *, generation: int, alias: str = "kp") -> dict:
    body = {"artifact_id": f"sha256:{model.name}", "model_path": str(model), "model_name": f"ft:tiny:{model.name}", "alias": alias}
    answer = client.put("/deployment", json={**body, "generation": generation, "params": {"alias": alias}, "trial": True})
    assert answer.status_code == 202, answer.text
    return answer.json()


def judge(client: TestClient, model: Path, *, generation: int, accepted: bool, alias: str = "kp"):
    body = {"model_name": f"ft:tiny:{model.name}", "alias": alias, "generation": generation, "accepted": accepted}
    return client.post("/deployment/verdict", json={**body, "reason": "" if accepted else "parity.live.top1 = 0.5"})


def test_a_rejected_deployment_gives_way_to_the_one_before(client: TestClient, tmp_path: Path) -> None:
    old, new = make_model(tmp_path, "old"), make_model(tmp_path, "new")
    put(client, old)
    until(ready(client, old))
    trial(client, new, generation=2)
    until(ready(client, new))
    report = judge(client, new, generation=2, accepted=False).json()
    assert (report["status"], report["generation"], report["error"]) == ("failed", 2, "parity.live.top1 = 0.5")
    until(lambda: client.get("/deployment").json()["serving"] == "ft:tiny:old")
    assert client.get("/deployment").json()["status"] == "failed"  # the newest deployment is still the rejected one


def test_an_accepted_deployment_is_the_one_to_go_back_to(client: TestClient, tmp_path: Path) -> None:
    old, new, third = (make_model(tmp_path, name) for name in ("old", "new", "third"))
    put(client, old)
    until(ready(client, old))
    trial(client, new, generation=2)
    assert judge(client, new, generation=2, accepted=True).json()["error"]["code"] == "wrong_state"  # it has not answered yet
    until(ready(client, new))
    assert judge(client, new, generation=2, accepted=True).json()["status"] == "ready"
    trial(client, third, generation=3)
    until(ready(client, third))
    assert judge(client, new, generation=2, accepted=False).json()["error"]["code"] == "superseded"
    judge(client, third, generation=3, accepted=False)
    until(lambda: client.get("/deployment").json()["serving"] == "ft:tiny:new")


def test_a_first_deployment_that_is_rejected_is_served_no_more(client: TestClient, tmp_path: Path) -> None:
    model = make_model(tmp_path, "model")
    trial(client, model, generation=1)
    until(ready(client, model))
    report = judge(client, model, generation=1, accepted=False).json()
    assert (report["status"], report["serving"]) == ("failed", None)
    put(client, model, generation=2)  # by hand, without a trial
    until(ready(client, model))


def test_a_second_alias_that_is_rejected_leaves_the_model_that_is_served_alone(client: TestClient, tmp_path: Path) -> None:
    model = make_model(tmp_path, "model")
    put(client, model)
    until(ready(client, model))
    trial(client, model, generation=7, alias="second")
    report = judge(client, model, generation=7, alias="second", accepted=False).json()
    assert (report["status"], report["serving"]) == ("failed", "ft:tiny:model")
    assert (model / "started").read_text().count("\n") == 1


def test_a_vllm_that_dies_while_it_is_measured_is_a_failed_deployment_and_no_crash(tmp_path: Path) -> None:
    """The stage would be started again and again for a model that kills the server each time."""
    model, evaluation = make_model(tmp_path, "model"), tmp_path / "evaluation"
    evaluation.mkdir()
    shutil.copyfile(Path(__file__).with_name("recorded") / "expected_base.json", evaluation / "expectations.json")
    (model / "die").touch()
    server = ModelServerSettings(vllm_command=VLLM, vllm_port=free_port(), cpu=True)
    with served(create_app(Settings(home=tmp_path / "home", model_server=server))) as url:
        config = DeployConfig(
            artifact_id="sha256:1",
            model_path=model,
            model_name="ft:tiny:model",
            alias="kp",
            generation=1,
            model_server_url=url,
            evaluation=evaluation,
            params=DeployParams(alias="kp"),
        )
        with pytest.raises(InvalidRequest, match=r"vLLM died while ft:tiny:model was measured: .*exit code 3: RuntimeError: out of luck"):
            run(config, workdir=tmp_path, progress=SilentProgress())
