"""The whole stack with its real processes: up, looked at, hurt, stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from standalone import state
from standalone.places import Places, find_places

ROOT = Path(__file__).resolve().parents[2]
UP = [sys.executable, "-m", "standalone", "up", "--auto-ports"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class RunningStack:
    """`parampara up` on a home folder of its own, started from a foreign working directory."""

    def __init__(self, home: Path) -> None:
        self.places = Places(project=ROOT, home=home)
        self.environment = {**os.environ, "PARAMPARA_HOME": str(home)}
        home.parent.mkdir(parents=True, exist_ok=True)
        self.output = home.parent / "up.out"
        with self.output.open("wb") as sink:
            options = {"stdout": sink, "stderr": subprocess.STDOUT, "cwd": "/", "start_new_session": True}
            self.process = subprocess.Popen(UP, env=self.environment, **options)
        self.until(self.ready, 240)

    def ready(self) -> bool:
        current = state.load(self.places)
        return current is not None and current.pid == self.process.pid and current.status == "ready"

    def until(self, happened: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None or self.process.returncode == 0, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.1)

    def state(self) -> state.StackState:
        return state.running(self.places)

    def record(self, name: str) -> state.ProcessRecord:
        return next(record for record in self.state().processes if record.name == name)

    def parampara(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "standalone", *words]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd="/", check=False)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(120)


@pytest.fixture(scope="module")
def stack() -> Iterator[RunningStack]:
    # not below pytest's own folder: every pytest that starts closes that one to others, and as root Postgres runs as another
    folder = Path(tempfile.mkdtemp(prefix="parampara-stack-"))
    running = RunningStack(folder / "home")
    yield running
    running.stop()
    shutil.rmtree(folder, ignore_errors=True)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_every_process_is_ready_and_answers_through_the_one_base_url(stack: RunningStack) -> None:
    assert stack.parampara("status").returncode == 0
    names = {record.name for record in stack.state().processes}
    assert {"postgres", "redis", "gateway", "control_plane", "embedder", "model_server", "worker-train", "worker-deploy"} <= names
    key = stack.places.api_key.read_text().strip()
    assert stack.places.api_key.stat().st_mode & 0o777 == 0o600
    base = stack.state().base_url
    assert httpx.get(f"{base}/runs", headers={"Authorization": f"Bearer {key}"}).json()["data"] == []
    assert httpx.get(f"{base}/runs", headers={"Authorization": "Bearer wrong"}).status_code == 401
    for record in stack.state().processes:
        assert Path(record.log).parent == stack.places.logs


def test_a_second_stack_on_the_same_home_is_refused(stack: RunningStack) -> None:
    done = subprocess.run(UP, env=stack.environment, capture_output=True, text=True, cwd="/", check=False, timeout=60)
    assert done.returncode != 0
    assert f"pid {stack.process.pid}" in done.stderr
    assert stack.parampara("status").returncode == 0


def test_taken_ports_are_told_before_anything_is_started(stack: RunningStack, tmp_path: Path) -> None:
    port = stack.state().ports["gateway"]
    environment = {**os.environ, "PARAMPARA_HOME": str(tmp_path / "other"), "PARAMPARA_GATEWAY__PORT": str(port)}
    done = subprocess.run(UP[:-1], env=environment, capture_output=True, text=True, cwd="/", check=False, timeout=60)
    assert done.returncode != 0
    assert f"port {port} (gateway)" in done.stderr
    assert "PARAMPARA_GATEWAY__PORT" in done.stderr
    assert not (tmp_path / "other" / "postgres").exists()


def test_a_killed_worker_and_a_killed_gateway_come_back(stack: RunningStack) -> None:
    for name in ("worker-merge", "gateway"):
        before = stack.record(name)
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        stack.until(lambda name=name, pid=before.pid: stack.record(name).state == "ready" and stack.record(name).pid != pid, 60)
        assert stack.record(name).restarts == before.restarts + 1
    assert "is started again" in stack.output.read_text()


def test_bad_commands_end_with_one_line_and_no_traceback(stack: RunningStack, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "x", "base_model": "tiny-llama", "surprise": 1}))
    book, questions = tmp_path / "book.txt", tmp_path / "qa.jsonl"
    book.write_text("The first star is Ashwini. " * 200)
    questions.write_text(json.dumps({"question": "Who?", "answer": "Ketu"}) + "\n")
    options = ("--books", str(book), "--qa", str(questions))
    unknown_key = stack.parampara("run", "submit", str(tmp_path / "recipe.yaml"), *options)
    missing = stack.parampara("run", "submit", str(tmp_path / "none.yaml"), *options)
    unserved = stack.parampara("ask", "Who rules Ashwini?", "--model", "nobody")
    for done, words in ((unknown_key, "recipe.surprise"), (missing, "none.yaml"), (unserved, "nobody")):
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_ctrl_c_stops_all_of_it_and_only_that(stack: RunningStack) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        pids = [record.pid for record in stack.state().processes if record.pid]
        assert len(pids) >= 12
        stack.stop()
        assert stack.process.returncode == 0, stack.output.read_text()
        assert not [pid for pid in pids if alive(pid)]
        assert stranger.poll() is None
        assert not state.is_running(stack.places)
        assert stack.parampara("status").returncode == 1
    finally:
        stranger.kill()
        stranger.wait()


def test_a_killed_stack_takes_its_processes_along_and_starts_again_on_the_same_data(stack: RunningStack) -> None:
    stack.stop()
    again = RunningStack(stack.places.home)
    try:
        key = again.places.api_key.read_text()
        pids = [record.pid for record in again.state().processes if record.pid]
        again.process.kill()
        again.process.wait()
        deadline = time.monotonic() + 60
        while [pid for pid in pids if alive(pid)]:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        third = RunningStack(stack.places.home)
        try:
            assert third.places.api_key.read_text() == key
            assert third.parampara("run", "list").returncode == 0
        finally:
            third.stop()
    finally:
        again.stop()


def test_the_home_folder_is_the_projects_own_or_the_one_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARAMPARA_HOME", raising=False)
    assert find_places() == Places(project=ROOT, home=ROOT / ".parampara")
    monkeypatch.setenv("PARAMPARA_HOME", "here")
    assert find_places().home == tmp_path / "here"
