"""Stages forked from a preloaded process end, stop, die and are told of as those started by themselves are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from parampara.db.session import transaction
from parampara.execution.preloaded import Preloaded
from parampara.execution.queue import request_cancel
from tests.shared.execution.test_supervisor import attempts, running, wait_for_step


@pytest.fixture
def preload(queue: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], psutil.Process]]:
    """Give the queue's supervisor a preloaded process that has done its imports; returns that process."""

    def start(what: str) -> psutil.Process:
        monkeypatch.setenv("PARAMPARA_DATABASE__URL", "postgresql://secret")
        queue.preloaded = Preloaded("sleepy", what)
        queue.preloaded.start()
        deadline = time.monotonic() + 60
        while not _has_spoken(queue.preloaded):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return psutil.Process(queue.preloaded._popen.pid)

    yield start
    if queue.preloaded is not None:
        queue.preloaded.stop()


def _has_spoken(preloaded: Preloaded) -> bool:
    import select

    assert preloaded._channel is not None
    return bool(select.select([preloaded._channel], [], [], 0)[0])


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_jobs_are_forked_one_after_the_other_and_end_as_usual(queue: Any, preload: Callable[[str], psutil.Process]) -> None:
    forking = preload("quiet")
    first = queue.enqueue(steps=40, seconds=0.02)
    with running(queue) as outcome:
        pid = wait_for_step(queue, first, 2)
        stage = psutil.Process(pid)
        assert stage.ppid() == forking.pid
        assert os.getsid(pid) == os.getpgid(pid) == pid
        assert (queue.settings.work_dir / first / "attempt-1.log").samefile(os.readlink(f"/proc/{pid}/fd/2"))
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull
        assert b"PARAMPARA_DATABASE__URL" not in open(f"/proc/{forking.pid}/environ", "rb").read()  # noqa: SIM115
    assert outcome == ["succeeded"]
    assert "-- train" in attempts(queue, first)[0].log_tail
    assert gone(pid)
    second = queue.enqueue(how="refuse", steps=2, seconds=0, at=1, exit="refuse")
    with running(queue) as outcome:
        pass
    assert outcome == ["failed"]
    assert attempts(queue, second)[0].exit_code == 78
    assert forking.is_running()


def test_cancelling_gives_time_and_then_kills(queue: Any, preload: Callable[[str], psutil.Process]) -> None:
    preload("quiet")
    for deaf, code in ((False, 75), (True, -9)):
        job_id = queue.enqueue(steps=10_000, seconds=0.01, deaf=deaf)
        with running(queue) as outcome:
            pid = wait_for_step(queue, job_id, 2)
            with transaction(queue.sessions) as session:
                request_cancel(session, job_id)
        assert outcome == ["cancelled"]
        assert attempts(queue, job_id)[0].exit_code == code
        assert gone(pid)


def test_the_end_of_the_forking_process_is_a_crash_of_the_stage_and_the_next_one_starts_as_usual(
    queue: Any, preload: Callable[[str], psutil.Process]
) -> None:
    forking = preload("quiet")
    job_id = queue.enqueue(steps=200, seconds=0.02)
    with running(queue) as outcome:
        pid = wait_for_step(queue, job_id, 2)
        forking.send_signal(signal.SIGKILL)
    assert outcome == ["crashed"]
    assert attempts(queue, job_id)[0].exit_code == -9
    wait_until_gone(pid)
    other = queue.enqueue()
    with running(queue) as outcome:
        pass
    assert outcome == ["succeeded"]
    assert queue.job(other).state == "succeeded"


def test_a_worker_that_is_killed_takes_both_with_it(queue: Any, preload: Callable[[str], psutil.Process]) -> None:
    job_id = queue.enqueue(steps=10_000, seconds=0.01)
    claim = queue.claimed()
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        try:
            os.write(writer, preload("quiet").pid.to_bytes(4, "little"))
            queue.run(claim)
        finally:
            os._exit(0)
    try:
        forking = int.from_bytes(os.read(reader, 4), "little")
        pid = wait_for_step(queue, job_id, 2)
        assert psutil.Process(pid).ppid() == forking
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        os.close(reader)
        os.close(writer)
    wait_until_gone(pid)
    wait_until_gone(forking)


def test_a_thread_that_lives_after_the_imports_refuses_every_fork(queue: Any, preload: Callable[[str], psutil.Process]) -> None:
    preload("threaded")
    job_id = queue.enqueue(steps=20, seconds=0.02)
    with running(queue) as outcome:
        assert psutil.Process(wait_for_step(queue, job_id, 1)).ppid() == os.getpid()
    assert outcome == ["succeeded"]
