"""Containers are killed in the middle of a run, and the run still ends succeeded and answers with citations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from standalone.asking import Question, ask_model
from standalone.client import Platform
from standalone.submitting import upload_all
from tests.containers.stack import ENDED, Stack, quick_recipe, until

KILL_WORKER = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").iterdir():
    if folder.name.isdigit() and b"trainer\\0worker" in (folder / "cmdline").read_bytes() and int(folder.name) != 1:
        os.kill(int(folder.name), signal.SIGKILL)
        print("killed")
"""


def job(platform: Platform, run: str, name: str) -> dict[str, Any]:
    return next(job for job in platform.get(f"/runs/{run}")["jobs"] if job["name"] == name)


def has_step(platform: Platform, run: str, name: str, step: int) -> bool:
    state = job(platform, run, name)
    assert state["status"] not in ENDED, f"{name} ended before it could be disturbed"
    return state["status"] == "running" and (state["progress"]["step"] or 0) >= step


@pytest.mark.timeout(1800)
def test_a_run_survives_the_death_of_its_trainer_of_redis_and_of_postgres(stack: Stack, data: dict[str, list[Path]]) -> None:
    platform = stack.platform()
    files = upload_all(platform, data)
    run = platform.post("/runs", {"recipe_yaml": quick_recipe(sft_steps=300), "datasets": files})["id"]

    # the worker dies of itself: its container is started again by the restart policy
    until("training", lambda: has_step(platform, run, "sft", 25), pause=0.2)
    restarts = stack.inspect("trainer")["RestartCount"]
    assert "killed" in stack.python("trainer", KILL_WORKER)
    until("restart", lambda: stack.inspect("trainer")["RestartCount"] > restarts)

    # `docker kill` from outside: a container killed so is started by whoever killed it
    until("resumed training", lambda: has_step(platform, run, "sft", 60), pause=0.2)
    stack.kill("trainer")
    stack.kill("redis")
    stack.up("trainer", "redis")

    until("resumed training", lambda: has_step(platform, run, "sft", 120), pause=0.2)
    stack.kill("postgres")
    stack.up("postgres")
    until("answers from the control plane", lambda: _answers(platform), seconds=60)

    ended = until("end of the run", lambda: _ended(platform, run), seconds=1200, pause=2)
    assert ended["status"] == "succeeded", ended["error"]
    assert all(job["status"] == "succeeded" for job in ended["jobs"])
    sft = platform.get(f"/jobs/{job(platform, run, 'sft')['id']}")
    states = [attempt["status"] for attempt in sft["attempts"]]
    assert states[-1] == "succeeded"
    assert states.count("succeeded") == 1
    assert len(states) >= 3, "the trainer was killed twice"
    for earlier, later in zip(sft["attempts"], sft["attempts"][1:], strict=False):
        assert earlier["finished_at"] <= later["started_at"], "no two attempts beside each other"

    store = platform.post("/vector_stores", {"name": "books", "file_ids": files["books"]})["id"]
    until("filled vector store", lambda: platform.get(f"/vector_stores/{store}")["status"] == "completed")
    platform.post("/aliases/kp", {"vector_store_id": store})
    answer = ask_model(platform, Question(text="Which planet rules the star Ashwini?"), model="kp")
    assert answer.model == ended["model"]
    assert answer.citations


def test_only_the_gateway_can_be_reached_from_outside(stack: Stack) -> None:
    published = [
        line for line in stack.compose("ps", "--format", "{{.Service}} {{.Publishers}}").stdout.splitlines() if "127.0.0.1" in line
    ]
    assert [line.split()[0] for line in published] == ["gateway"]


def test_containers_stop_quickly_and_write_nowhere_but_to_their_volumes(stack: Stack) -> None:
    for service in (
        "gateway",
        "control-plane",
        "embedder",
        "trainer",
        "merger",
        "quantizer",
        "evaluator",
        "ingestor",
        "deployer",
        "model-server",
    ):
        state = stack.inspect(service)
        assert state["HostConfig"]["ReadonlyRootfs"], service
        assert state["Config"]["User"] == "10001:10001", service
        assert state["HostConfig"]["CapDrop"] == ["ALL"], service
    stack.compose("stop", "--timeout", "60", "merger", "gateway")
    for service in ("merger", "gateway"):
        assert stack.inspect(service)["State"]["ExitCode"] in (0, 143), service
    stack.up("merger", "gateway")


def _answers(platform: Platform) -> bool:
    try:
        return bool(platform.get("/runs"))
    except Exception:  # noqa: BLE001 - whatever it says while the database is away
        return False


def _ended(platform: Platform, run: str) -> dict[str, Any] | None:
    try:
        state = platform.get(f"/runs/{run}")
    except Exception:  # noqa: BLE001 - a database that has just been killed
        return None
    return state if state["status"] in ENDED else None
