"""Doorbells, the table poll and the reconciler, with a real broker and real worker processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
import structlog
from sqlalchemy import func, select, update

from parampara.db.models import Attempt, Job, Outbox
from parampara.db.session import transaction
from parampara.execution import inputs, metrics
from parampara.execution.doorbell import TASK, greet, make_app, prune, ring
from parampara.execution.reconciler import reconcile_once
from parampara.execution.worker import Worker


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start_worker(queue: Any) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``python -m sleepy worker`` with the test's settings; whatever is left is killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**options: str) -> subprocess.Popen[bytes]:
        settings = queue.settings
        environment = {
            "PARAMPARA_HOME": str(settings.home),
            "PARAMPARA_DATABASE__URL": settings.database.url,
            "PARAMPARA_REDIS__URL": settings.redis.url,
            "PARAMPARA_BASE_MODELS": f'{{"tiny": "{settings.base_models["tiny"]}"}}',
            "PARAMPARA_WORKER__LEASE_SECONDS": "3",
            "PARAMPARA_WORKER__HEARTBEAT_SECONDS": "0.5",
            "PARAMPARA_WORKER__POLL_SECONDS": "0.3",
            **options,
        }
        worker = subprocess.Popen([sys.executable, "-m", "sleepy", "worker"], env={**os.environ, **environment})
        started.append(worker)
        return worker

    yield start
    for worker in started:
        worker.kill()
        worker.wait(10)


def unsent(queue: Any) -> int:
    with queue.sessions() as session:
        return session.execute(select(func.count()).select_from(Outbox).where(Outbox.sent_at.is_(None))).scalar_one()


def test_a_doorbell_carries_the_id_and_wakes_a_worker(queue: Any, start_worker: Any) -> None:
    """The poll is switched off in effect, so that only the message can have woken it."""
    start_worker(PARAMPARA_WORKER__POLL_SECONDS="3600")
    app = make_app(queue.settings)
    first = queue.enqueue()
    assert ring(app, queue.sessions) == 1
    assert ring(app, queue.sessions) == 0  # sent once
    wait_until(lambda: queue.job(first).state == "succeeded")
    second = queue.enqueue(steps=20, seconds=0.05)
    for _ in range(5):  # duplicates are harmless
        app.send_task(TASK, args=[second], queue="train")
    wait_until(lambda: queue.job(second).state == "succeeded")
    with queue.sessions() as session:
        assert session.execute(select(func.count()).select_from(Attempt)).scalar_one() == 2


def test_with_the_broker_away_jobs_run_by_polling(queue: Any, redis_server: Any, start_worker: Any) -> None:
    redis_server.stop()
    try:
        worker = start_worker()
        job_id = queue.enqueue()
        began = time.monotonic()
        assert ring(make_app(queue.settings), queue.sessions) == 0
        assert time.monotonic() - began < 10, "a broker that is away must not hold up a request"
        assert unsent(queue) == 1
        wait_until(lambda: queue.job(job_id).state == "succeeded")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        redis_server.start()
    assert reconcile_once(queue.sessions, lambda: ring(make_app(queue.settings), queue.sessions), max_crashes=3).rung == 1


def test_an_emptied_broker_loses_no_job(queue: Any, redis_url: str, start_worker: Any) -> None:
    job_id = queue.enqueue()
    assert ring(make_app(queue.settings), queue.sessions) == 1
    with redis.Redis.from_url(redis_url) as broker:
        assert broker.llen("train") == 1
        broker.flushall()
    start_worker()
    wait_until(lambda: queue.job(job_id).state == "succeeded")


def test_sigterm_gives_the_job_back_quickly_and_another_worker_ends_it(queue: Any, start_worker: Any) -> None:
    job_id = queue.enqueue(steps=100, seconds=0.05)
    worker = start_worker()
    wait_until(lambda: queue.job(job_id).progress.get("step", 0) > 2)
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(30) == 0
    assert time.monotonic() - began < 15
    job = queue.job(job_id)
    assert (job.state, job.crashes) == ("queued", 0)
    start_worker()
    wait_until(lambda: queue.job(job_id).state == "succeeded")
    assert queue.job(job_id).result["resumed_from_step"] > 2


def test_metrics_and_probes(queue: Any, start_worker: Any) -> None:
    port = free_port()
    start_worker(PARAMPARA_WORKER__METRICS_PORT=str(port))
    job_id = queue.enqueue()
    wait_until(lambda: queue.job(job_id).state == "succeeded")

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.read().decode()

    wait_until(lambda: 'parampara_jobs_total{kind="dapt",outcome="succeeded"} 1.0' in get("/metrics"))
    text = get("/metrics")
    assert 'parampara_stage_step{kind="dapt"} 3.0' in text
    assert 'parampara_jobs_running{kind="dapt"} 0.0' in text
    assert get("/livez") == get("/readyz") == "ok\n"


def test_a_busy_worker_drops_a_doorbell_and_finds_the_job_when_it_is_free(queue: Any, sessions: Any) -> None:
    worker = Worker(queue.settings, sessions, make_app(queue.settings), service="sleepy", queue="train")
    first, second = queue.enqueue(), queue.enqueue()
    assert worker._busy.acquire(blocking=False)
    assert worker.offer(first) == 0
    worker._busy.release()
    assert worker.offer(second) == 2  # the one it was called for, then the other
    assert {queue.job(first).state, queue.job(second).state} == {"succeeded"}


def test_the_heartbeat_age_of_an_idle_worker_starts_anew_with_every_look(
    queue: Any, sessions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_newest_sign", [time.monotonic() - 1000])
    (before,) = next(iter(metrics.HEARTBEAT_AGE.collect())).samples
    worker = Worker(queue.settings, sessions, make_app(queue.settings), service="sleepy", queue="train")
    assert worker.offer() == 0
    (after,) = next(iter(metrics.HEARTBEAT_AGE.collect())).samples
    assert (before.value > 900, after.value < 500) == (True, True)


def test_an_unexpected_error_costs_the_attempt_and_not_the_worker(queue: Any, sessions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad, good = queue.enqueue(), queue.enqueue()
    real = inputs.resolve

    def resolve(*arguments: Any) -> inputs.Resolved:
        if queue.job(bad).state == "running":
            raise KeyError("a bug")
        return real(*arguments)

    monkeypatch.setattr(inputs, "resolve", resolve)
    queue.settings.worker.max_crashes = 1
    worker = Worker(queue.settings, sessions, make_app(queue.settings), service="sleepy", queue="train")
    worker.start_polling()
    try:
        wait_until(lambda: queue.job(good).state == "succeeded")
        wait_until(lambda: queue.job(bad).state == "failed")
        assert worker.faults() == []
    finally:
        worker.stop()
    assert (queue.job(bad).error["code"], queue.job(bad).crashes) == ("crash_loop", 1)
    assert "KeyError: 'a bug'" in queue.job(bad).error["message"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_poll_outlives_any_error_and_its_end_is_a_fault(queue: Any, sessions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(queue.settings, sessions, make_app(queue.settings), service="sleepy", queue="train")
    calls: list[int] = []

    def offer() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("a bug")
        sys.exit()  # the quiet end of a thread

    monkeypatch.setattr(worker, "offer", offer)
    worker.start_polling()
    wait_until(lambda: worker.faults() != [])
    assert (len(calls), "restart this worker" in worker.faults()[0]) == (2, True)
    worker.stop()


def test_the_reconciler_takes_back_leases_of_queues_without_workers(queue: Any) -> None:
    job_id = queue.enqueue()
    queue.claimed()
    with transaction(queue.sessions) as session:
        session.execute(update(Job).values(lease_until=func.now() - timedelta(seconds=1)))
    done = reconcile_once(queue.sessions, lambda: 0, max_crashes=3)
    assert (done.expired, queue.job(job_id).state) == (1, "queued")
    assert reconcile_once(queue.sessions, lambda: 0, max_crashes=3).expired == 0


def test_the_reconciler_settles_a_run_that_stopped_moving(queue: Any) -> None:
    run_id = queue.start_run(deploy=None)
    queue.run(queue.claimed())
    with transaction(queue.sessions) as session:  # what no code path does, but an operator's hand might
        session.execute(update(Job).where(Job.run_id == run_id, Job.state == "queued").values(state="waiting"))
    assert queue.claim("merge") is None
    reconcile_once(queue.sessions, lambda: 0, max_crashes=3)
    assert queue.claimed("merge").name == "merge_dapt"


def test_old_doorbells_are_forgotten(queue: Any) -> None:
    queue.enqueue()
    ring(make_app(queue.settings), queue.sessions)
    with transaction(queue.sessions) as session:
        prune(session)
        assert session.execute(select(func.count()).select_from(Outbox)).scalar_one() == 1
        prune(session, keep=timedelta(0))
        assert session.execute(select(func.count()).select_from(Outbox)).scalar_one() == 0


def test_a_broker_that_does_not_answer_is_told_with_its_setting_and_without_its_password(settings: Any) -> None:
    settings.redis.url = f"redis://:secret@127.0.0.1:{free_port()}/0"
    with structlog.testing.capture_logs() as logs:
        greet(settings)
    (record,) = logs
    assert record["log_level"] == "warning"
    assert "PARAMPARA_REDIS__URL" in record["event"]
    assert "secret" not in str(record)
