"""One attempt with a real stage process: every way it can end."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import create_engine, func, make_url, select, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from parampara.db.models import Artifact, Attempt, Event, Job
from parampara.db.session import transaction
from parampara.execution import inputs, process, products, supervisor, watch
from parampara.execution.lease_keeper import LeaseKeeper
from parampara.execution.queue import request_cancel


def attempts(queue: Any, job_id: str) -> list[Attempt]:
    with queue.sessions() as session:
        return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.number)))


def wait_for_step(queue: Any, job_id: str, step: int) -> int:
    """Wait until the stage has made a step; returns its pid."""
    trace = queue.settings.work_dir / job_id / "trace.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = trace.read_text().splitlines() if trace.exists() else []
        if len(lines) >= step:
            return json.loads(lines[-1])[0]
        time.sleep(0.02)
    raise AssertionError("the stage made no step")


@contextmanager
def running(queue: Any) -> Iterator[list[str]]:
    """Supervise the next job in a thread; the list holds the outcome afterwards."""
    claim, outcome = queue.claimed(lease_seconds=queue.settings.worker.lease_seconds), []
    thread = threading.Thread(target=lambda: outcome.append(queue.run(claim)))
    thread.start()
    yield outcome
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("how", "outcome", "code"),
    [("diverged", "failed", "diverged"), ("memory", "failed", "out_of_memory"), ("refuse", "failed", "invalid_data")],
)
def test_an_error_that_would_come_again_fails_the_job(queue: Any, how: str, outcome: str, code: str) -> None:
    job_id = queue.enqueue(exit=how, at=2)
    assert queue.run(queue.claimed()) == outcome
    job, (attempt,) = queue.job(job_id), attempts(queue, job_id)
    assert (job.state, job.error["code"], attempt.state) == ("failed", code, "failed")
    assert attempt.exit_code == {"diverged": 76, "memory": 77, "refuse": 78}[how]
    assert job.error["message"] in attempt.log_tail


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("crash", 1, "RuntimeError: a bug in the stage"),
        ("kill", -9, "killed by SIGKILL"),
        ("preempted", 75, "nobody had asked it to: stopped by itself"),
    ],
)
def test_a_crash_is_tried_again_until_it_is_a_crash_loop(queue: Any, how: str, code: int, said: str) -> None:
    job_id = queue.enqueue(exit=how, at=2)
    for number in (1, 2, 3):
        with transaction(queue.sessions) as session:
            session.execute(update(Job).values(not_before=func.now()))
        assert queue.run(queue.claimed()) == "crashed"
        attempt = attempts(queue, job_id)[-1]
        assert (attempt.number, attempt.exit_code) == (number, code)
        assert said in attempt.error["message"]
    job = queue.job(job_id)
    assert (job.state, job.error["code"]) == ("failed", "crash_loop")
    assert said in job.error["message"]


def test_a_workdir_that_another_process_holds_is_waited_for_without_counting(queue: Any) -> None:
    job_id = queue.enqueue(exit="busy", at=1)
    for _ in range(4):
        with transaction(queue.sessions) as session:
            session.execute(update(Job).values(not_before=func.now()))
        assert queue.run(queue.claimed()) == "preempted"
        assert queue.claim() is None, "not tried again at once"
    job, attempt = queue.job(job_id), attempts(queue, job_id)[-1]
    assert (job.state, job.crashes, attempt.state, attempt.exit_code) == ("queued", 0, "preempted", 74)
    assert attempt.error["message"] == "process 7 still works here"
    with transaction(queue.sessions) as session:
        assert session.scalar(select(Job.not_before - func.now())) > timedelta(seconds=5)


@pytest.mark.parametrize("asked", ["gather", "find_twin"])
def test_a_moment_without_the_database_at_the_start_costs_nothing(queue: Any, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = queue.enqueue()
    real, calls = getattr(inputs, asked), []

    def away_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OperationalError("SELECT", {}, Exception("server closed the connection"))
        return real(*arguments)

    monkeypatch.setattr(inputs, asked, away_once)
    monkeypatch.setattr(supervisor, "_AGAIN_SECONDS", 0.01)
    assert queue.run(queue.claimed()) == "succeeded"
    assert (len(calls), queue.job(job_id).crashes) == (2, 0)


def test_what_postgres_can_not_hold_is_dropped_from_what_a_stage_says(queue: Any) -> None:
    """A NUL reaches a stage easily: it is legal in the JSON of an uploaded row."""
    odd = " a\0b\ud800c"
    good, bad = queue.enqueue(steps=2, says=odd), queue.enqueue(steps=2, exit="refuse", at=2, says=odd)
    assert [queue.run(queue.claimed()) for _ in range(2)] == ["succeeded", "failed"]
    assert queue.job(good).result["backend_reason"] == " abc"
    assert queue.job(bad).error["message"] == "row 3 has no question abc"
    with queue.sessions() as session:
        told = session.scalars(select(Event).where(Event.job_id == good, Event.message == " abc")).all()
    assert [event.data for event in told] == [{"said": " abc"}] * 2
    assert queue.job(good).progress["step"] == 2


def test_a_result_that_the_database_refuses_fails_the_job_with_its_words(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = queue.enqueue()
    monkeypatch.setattr("parampara.execution.exits.storable", lambda value: {**value, "backend_reason": "x\0y"})
    assert queue.run(queue.claimed()) == "failed"
    job = queue.job(job_id)
    assert (job.state, job.error["code"], attempts(queue, job_id)[0].state) == ("failed", "bad_result", "failed")
    assert "cannot be converted to text" in job.error["message"]


def test_progress_that_the_database_refuses_does_not_hold_up_what_comes_after(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = queue.enqueue(steps=2)
    real = watch.ProgressBook.pending
    flushes = []

    def pending(book: watch.ProgressBook) -> list[dict[str, Any]]:
        flushes.append(1)
        events = real(book)
        return events if len(flushes) > 1 else [{**events[0], "data": {"a": "x\0y"}}]

    monkeypatch.setattr(watch.ProgressBook, "pending", pending)
    keeper = supervisor.Supervisor(queue.settings, queue.sessions, service="sleepy", stopping=queue.stopping)
    claim = queue.claimed()
    book, lease = watch.ProgressBook({}), LeaseKeeper(queue.sessions, claim, queue.settings.worker)
    for step in (1, 2):
        book.fold({"type": "step", "t": float(step), "step": step, "total": 2, "metrics": {}})
        keeper._flush(claim, lease, book)
    assert queue.job(job_id).progress["step"] == 2


def test_a_running_job_is_cancelled_within_its_grace(queue: Any) -> None:
    job_id = queue.enqueue(steps=10_000, seconds=0.01)
    with running(queue) as outcome:
        pid = wait_for_step(queue, job_id, 2)
        with transaction(queue.sessions) as session:
            request_cancel(session, job_id)
    assert outcome == ["cancelled"]
    assert queue.job(job_id).state == "cancelled"
    assert attempts(queue, job_id)[0].exit_code == 75  # it was given the time to checkpoint
    assert not psutil.pid_exists(pid)


def test_a_stage_that_ignores_sigterm_is_killed(queue: Any) -> None:
    job_id = queue.enqueue(steps=10_000, seconds=0.01, deaf=True)
    with running(queue) as outcome:
        pid = wait_for_step(queue, job_id, 2)
        with transaction(queue.sessions) as session:
            request_cancel(session, job_id)
    assert outcome == ["cancelled"]
    assert attempts(queue, job_id)[0].exit_code == -9
    assert not psutil.pid_exists(pid)


def test_a_stopping_worker_gives_the_job_back_and_the_next_attempt_resumes(queue: Any) -> None:
    job_id = queue.enqueue(steps=60, seconds=0.02)
    with running(queue) as outcome:
        wait_for_step(queue, job_id, 3)
        queue.stopping.set()
    assert outcome == ["preempted"]
    job = queue.job(job_id)
    assert (job.state, job.crashes, attempts(queue, job_id)[0].state) == ("queued", 0, "preempted")
    queue.stopping.clear()
    assert queue.run(queue.claimed()) == "succeeded"
    assert queue.job(job_id).result["resumed_from_step"] >= 3
    steps = [json.loads(line)[2] for line in (queue.settings.work_dir / job_id / "trace.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))


def test_a_silent_stage_is_a_stall_and_counts_as_a_crash(queue: Any) -> None:
    job_id = queue.enqueue(steps=10_000, seconds=0.05, silent=True)
    queue.settings.worker.stall_seconds = 1.0
    with running(queue) as outcome:
        pass
    assert outcome == ["crashed"]
    attempt = attempts(queue, job_id)[0]
    assert attempt.error["code"] == "stalled"
    assert "Current thread" in attempt.log_tail  # the stack dump that shows where it hung


def test_a_lost_lease_kills_the_stage_and_writes_nothing(queue: Any) -> None:
    job_id = queue.enqueue(steps=10_000, seconds=0.01)
    with running(queue) as outcome:
        pid = wait_for_step(queue, job_id, 2)
        with transaction(queue.sessions) as session:  # as if another worker had claimed it
            session.execute(update(Job).values(fence=Job.fence + 1, owner="other", lease_until=func.now()))
        before = queue.job(job_id).progress
    assert outcome == ["stale"]
    assert not psutil.pid_exists(pid)
    job = queue.job(job_id)
    assert (job.state, job.owner, job.progress) == ("running", "other", before)
    assert attempts(queue, job_id)[0].state == "running"  # whoever took the job closes it


@contextmanager
def database_hangs(queue: Any) -> Iterator[None]:
    """Every statement on jobs waits."""
    with queue.sessions() as session, session.begin():
        session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        yield


@contextmanager
def database_refuses(queue: Any) -> Iterator[None]:
    """Every connection is refused."""
    url = make_url(queue.settings.database.url)
    other = create_engine(url.set(database="postgres"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS false"))
        connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": url.database})
        yield
        connection.execute(text(f"ALTER DATABASE {url.database} ALLOW_CONNECTIONS true"))


@pytest.mark.parametrize("away", [database_hangs, database_refuses])
def test_without_the_database_for_longer_than_the_lease_the_stage_is_stopped_and_nothing_counts(queue: Any, away: Any) -> None:
    job_id = queue.enqueue(steps=10_000, seconds=0.01)
    with running(queue) as outcome:
        pid = wait_for_step(queue, job_id, 2)
        with away(queue):
            deadline = time.monotonic() + 60
            while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline, "the stage went on without a lease"
                time.sleep(0.05)
            assert outcome == []  # it waits to write how it ended
    assert outcome == ["preempted"]
    job, (attempt,) = queue.job(job_id), attempts(queue, job_id)
    assert (job.state, job.crashes, attempt.state) == ("queued", 0, "preempted")
    assert "away for longer than the lease" in attempt.error["message"]


def test_two_attempts_never_run_in_one_workdir(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan that still holds the workdir keeps the next attempt waiting."""
    job_id = queue.enqueue(steps=40, seconds=0.05)
    first = queue.claimed()
    thread = threading.Thread(target=queue.run, args=(first,))
    thread.start()
    wait_for_step(queue, job_id, 2)
    with transaction(queue.sessions) as session:
        session.execute(update(Job).values(state="queued"))
    second = queue.claimed()
    assert queue.run(second) == "succeeded"
    thread.join(60)
    trace = [json.loads(line) for line in (queue.settings.work_dir / job_id / "trace.jsonl").read_text().splitlines()]
    spans = {pid: [t for other, t, _ in trace if other == pid] for pid, _, _ in trace}
    (_, first_end), (second_start, _) = ((min(times), max(times)) for times in spans.values())
    assert first_end < second_start


def test_disk_full_while_publishing_fails_with_what_to_do(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = queue.enqueue()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parampara.storage.fsync_tree", full)
    assert queue.run(queue.claimed()) == "failed"
    error = queue.job(job_id).error
    assert error["code"] == "disk_full"
    assert "No space left on device. Free disk space and retry the job." in error["message"]
    left = [path for path in queue.settings.artifacts_dir.rglob("*") if path.is_file()]
    assert left == []
    with queue.sessions() as session:
        assert session.scalars(select(Artifact)).all() == []


def test_secrets_and_settings_do_not_reach_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = {"PARAMPARA_DATABASE__URL", "PARAMPARA_KEY_PEPPER", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "PGPASSWORD"}
    for name in secret:
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = process.stage_environment()
    assert not secret & set(environment)
    assert (environment["OMP_NUM_THREADS"], environment["HF_HUB_OFFLINE"]) == ("3", "1")
    assert [name for name in environment if name.startswith("PARAMPARA_")] == ["PARAMPARA_SUPERVISOR_PID"]


def test_an_unknown_base_model_fails_the_job_with_its_name(queue: Any) -> None:
    job_id = queue.enqueue()
    queue.settings.base_models.clear()
    assert queue.run(queue.claimed()) == "failed"
    assert queue.job(job_id).error["code"] == "model_not_found"


def test_progress_and_events_reach_the_database(queue: Any) -> None:
    job_id = queue.enqueue(steps=5)
    queue.run(queue.claimed())
    job = queue.job(job_id)
    assert (job.progress["phase"], job.progress["step"], job.progress["total"]) == ("train", 5, 5)
    assert job.progress["metrics"]["loss"] == pytest.approx(0.2)
    with queue.sessions() as session:
        events = session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.id)).all()
    assert [event.type for event in events] == ["state", "state", "message", "metrics", "state"]
    assert [event.attempt for event in events] == [None, 1, 1, 1, 1]


def test_a_job_whose_worker_dies_takes_its_stage_with_it(queue: Any, tmp_path: Path) -> None:
    """The kernel kills the stage when the supervising process goes, however it goes."""
    job_id = queue.enqueue(steps=10_000, seconds=0.01)
    claim = queue.claimed()
    child = os.fork()
    if child == 0:  # a process that does nothing but supervise
        try:
            queue.run(claim)
        finally:
            os._exit(0)
    try:
        pid = wait_for_step(queue, job_id, 2)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the stage outlived its supervisor"
        time.sleep(0.02)


def test_disk_errors_read_well() -> None:
    assert products.disk_error(OSError(13, "Permission denied"), "cannot write")["code"] == "storage_failed"
