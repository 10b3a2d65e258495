"""Children: restarted when they die, stopped whole, and gone when their parent is gone."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from standalone.processes import Child, Spec, created_at, end_leftovers, tail
from tests.conftest import free_port

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "child.log"


def until(happened: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_child_that_dies_is_started_again_with_growing_waits(log: Path) -> None:
    child = Child(Spec("c", [sys.executable, "-c", "import sys; print('gone wrong'); sys.exit(3)"], lambda: False), log=log)
    child.start()
    until(lambda: child.tick() and child.restarts == 2)
    assert child.exit_code == 3
    assert child.state == "restarting"
    assert log.read_text().count("gone wrong") == 2
    assert child.tail() == "gone wrong"


def test_readiness_is_asked_for_and_told_once(log: Path) -> None:
    answers = iter([False, True])
    child = Child(Spec("c", SLEEP, lambda: next(answers)), log=log)
    child.start()
    try:
        assert (child.tick(), child.state) == (False, "starting")
        assert (child.tick(), child.state) == (True, "ready")
        assert child.tick() is False
    finally:
        child.ask_to_stop()
        child.stop()
    assert child.pid is None


def test_an_answer_on_the_port_of_somebody_else_does_not_make_a_child_ready(log: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        child = Child(Spec("c", SLEEP, lambda: True, port=port), log=log)
        child.start()
        try:
            child.tick()
            assert child.state == "starting"
        finally:
            child.ask_to_stop()
            child.stop()


def test_a_child_that_holds_its_port_becomes_ready(log: Path) -> None:
    port = free_port()
    listen = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    child = Child(Spec("c", [sys.executable, "-c", listen], lambda: True, port=port), log=log)
    child.start()
    try:
        deadline = time.monotonic() + 20
        while child.state != "ready":
            assert time.monotonic() < deadline
            child.tick()
            time.sleep(0.05)
        socket.create_connection(("127.0.0.1", port), timeout=5).close()  # ready means that it listens
    finally:
        child.ask_to_stop()
        child.stop()
    assert child.pid is None


def test_stop_kills_what_ignores_sigterm_and_its_children(log: Path) -> None:
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print(p.pid, flush=True); time.sleep(600)"
    )
    child = Child(Spec("c", [sys.executable, "-c", stubborn], lambda: True, stop_seconds=0.5), log=log)
    child.start()
    until(lambda: child.tail().strip())
    grandchild = int(child.tail())
    assert alive(grandchild)
    child.ask_to_stop()
    child.stop()
    assert child.pid is None
    until(lambda: not alive(grandchild))


def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    code = f"""
import sys, time
from pathlib import Path
from standalone.processes import Child, Spec
spec = Spec("c", [sys.executable, "-c", "import time; time.sleep(600)"], lambda: True)
child = Child(spec, log=Path({str(tmp_path / "logs" / "c.log")!r}))
child.start()
print(child.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.wait()
    until(lambda: not alive(pid))


def test_leftovers_are_recognised_by_creation_time_and_nobody_else_is_hit() -> None:
    left, stranger = (subprocess.Popen(SLEEP, start_new_session=True, stdout=subprocess.DEVNULL) for _ in range(2))
    try:
        recorded = [(left.pid, created_at(left.pid)), (stranger.pid, created_at(stranger.pid) - 100), (2**22 - 1, 1.0)]
        assert end_leftovers(recorded) == [left.pid]
        left.wait(10)
        assert stranger.poll() is None
    finally:
        for process in (left, stranger):
            process.kill()
            process.wait()


def test_tail_of_nothing_is_nothing(tmp_path: Path) -> None:
    assert tail(tmp_path / "none") == ""
    assert created_at(2**22 - 1) == 0.0
