"""kill -9 and SIGSTOP of real workers in the middle of a stage: nothing overlaps, nothing is lost, nothing is made twice."""

from __future__ import annotations

import json
import random
import signal
import time
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy import select

from parampara.db.models import Artifact, Attempt

STEPS = 120


FAST_LEASE = {
    "PARAMPARA_WORKER__LEASE_SECONDS": "1.5",
    "PARAMPARA_WORKER__HEARTBEAT_SECONDS": "0.3",
    "PARAMPARA_WORKER__MAX_CRASHES": "10",
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_nine_at_random_moments(queue: Any, start_worker: Any, seed: int) -> None:
    dice = random.Random(seed)
    job_id = queue.enqueue(steps=STEPS, seconds=0.05)
    for _ in range(4):
        worker, before = start_worker(**FAST_LEASE), steps_made(queue, job_id)
        while steps_made(queue, job_id) == before:
            assert queue.job(job_id).state in ("queued", "running")
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 1.0))
        worker.kill()
        worker.wait(10)
    start_worker(**FAST_LEASE)
    wait_for(lambda: queue.job(job_id).state not in ("queued", "running"))
    check(queue, job_id)
    with queue.sessions() as session:
        states = list(session.scalars(select(Attempt.state).order_by(Attempt.number)))
    assert states[-1] == "succeeded"
    assert set(states[:-1]) == {"lost"}


@pytest.mark.slow
def test_a_worker_that_sleeps_longer_than_its_lease(queue: Any, start_worker: Any) -> None:
    """The zombie's stage runs on; the heir's waits for the workdir; the zombie wakes, sees its lease gone, and kills its own."""
    job_id = queue.enqueue(steps=STEPS, seconds=0.1)
    zombie = start_worker(**FAST_LEASE)
    wait_for(lambda: steps_made(queue, job_id) > 2)
    zombie.send_signal(signal.SIGSTOP)
    start_worker(**FAST_LEASE)
    wait_for(lambda: queue.job(job_id).fence == 2)
    zombie.send_signal(signal.SIGCONT)
    wait_for(lambda: queue.job(job_id).state == "succeeded")
    check(queue, job_id)
    assert len({pid for pid, _, _ in trace(queue, job_id)}) == 2
    with queue.sessions() as session:
        assert list(session.scalars(select(Attempt.state).order_by(Attempt.number))) == ["lost", "succeeded"]


def check(queue: Any, job_id: str) -> None:
    """The job ended once, its attempts never overlapped, and every step was made in order, none skipped."""
    job, rows = queue.job(job_id), trace(queue, job_id)
    assert job.state == "succeeded", job.error
    with queue.sessions() as session:
        assert [artifact.id for artifact in session.scalars(select(Artifact))] == [job.artifact_id]
        assert sum(state == "succeeded" for state in session.scalars(select(Attempt.state))) == 1
    pids = list(dict.fromkeys(pid for pid, _, _ in rows))
    spans = [[t for pid, t, _ in rows if pid == wanted] for wanted in pids]
    for earlier, later in pairwise(spans):
        assert max(earlier) < min(later), "two attempts ran beside each other"
    steps = [step for _, _, step in rows]
    # a step whose checkpoint was not written before the kill is made again; none is skipped, none older is
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(steps))
    assert (steps[0], steps[-1]) == (1, STEPS)


def trace(queue: Any, job_id: str) -> list[tuple[int, float, int]]:
    path = queue.settings.work_dir / job_id / "trace.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def steps_made(queue: Any, job_id: str) -> int:
    return len(trace(queue, job_id))


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)
