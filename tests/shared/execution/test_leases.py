"""Claims, fences and expiry: one winner, and a worker that lost its job changes nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import and_, func, select, update

from parampara.db.models import Attempt, Event, Job, Outbox
from parampara.db.session import transaction
from parampara.execution import leases, outcomes
from parampara.execution.leases import Beat, Claim
from parampara.execution.queue import request_cancel


def test_of_many_claimers_one_wins(queue: Any) -> None:
    job_id = queue.enqueue()
    count = 16
    barrier = Barrier(count)

    def try_to_claim(number: int) -> Claim | None:
        barrier.wait()
        return queue.claim(worker=f"w{number}")

    with ThreadPoolExecutor(count) as pool:
        won = [claim for claim in pool.map(try_to_claim, range(count)) if claim is not None]
    assert [(claim.job_id, claim.fence, claim.attempt) for claim in won] == [(job_id, 1, 1)]
    assert queue.job(job_id).owner == won[0].worker


def test_many_claimers_share_many_jobs_without_doubles(queue: Any) -> None:
    made = {queue.enqueue() for _ in range(12)}
    with ThreadPoolExecutor(6) as pool:
        claims = list(pool.map(lambda number: queue.claim(worker=f"w{number}"), range(18)))
    taken = [claim.job_id for claim in claims if claim is not None]
    assert len(taken) == len(set(taken))
    while (claim := queue.claim()) is not None:
        taken.append(claim.job_id)
    assert set(taken) == made
    assert len(taken) == len(made)


def test_oldest_first_and_only_of_the_queue(queue: Any) -> None:
    first, _second = queue.enqueue(), queue.enqueue()
    assert queue.claim("merge") is None
    assert queue.claimed().job_id == first


def test_a_message_for_a_job_claims_that_one_only(queue: Any) -> None:
    _first, second = queue.enqueue(), queue.enqueue()
    options = {"queue": "train", "worker": "w", "lease_seconds": 30, "max_crashes": 3}
    claim = leases.take(queue.sessions, job_id=second, **options)
    assert claim is not None
    assert claim.job_id == second
    assert leases.take(queue.sessions, job_id=second, **options) is None  # a duplicate doorbell


def test_an_expired_lease_is_claimed_again(queue: Any) -> None:
    job_id = queue.enqueue()
    zombie = queue.claimed(worker="old")
    assert queue.claim(worker="new") is None
    let_expire(queue, job_id)
    heir = queue.claimed(worker="new")
    assert (heir.job_id, heir.fence, heir.attempt) == (job_id, 2, 2)
    with queue.sessions() as session:
        states = session.execute(select(Attempt.state, Attempt.worker).order_by(Attempt.number)).all()
        assert [tuple(row) for row in states] == [("lost", "old"), ("running", "new")]
        assert leases.heartbeat(session, zombie, lease_seconds=30) == Beat(alive=False)
    assert queue.job(job_id).crashes == 1


def test_a_late_heartbeat_keeps_a_job_that_nobody_took(queue: Any) -> None:
    job_id = queue.enqueue()
    claim = queue.claimed()
    let_expire(queue, job_id)
    with transaction(queue.sessions) as session:
        assert leases.heartbeat(session, claim, lease_seconds=30).alive
    assert queue.claim() is None


WRITES = {
    "succeed": lambda queue, session, claim: outcomes.succeed(session, claim, settings=queue.settings, result={}),
    "fail": lambda queue, session, claim: outcomes.fail(session, claim, error={"code": "x", "message": "x"}),
    "crash": lambda queue, session, claim: outcomes.crash(session, claim, error={"code": "x", "message": "x"}, max_crashes=3),
    "release": lambda queue, session, claim: outcomes.release(session, claim, reason="x"),
    "cancel": lambda queue, session, claim: outcomes.cancel(session, claim),
    "record": lambda queue, session, claim: leases.record(session, claim, progress={"step": 99}, events=[MESSAGE]).alive,
    "heartbeat": lambda queue, session, claim: leases.heartbeat(session, claim, lease_seconds=999).alive,
}
MESSAGE = {"type": "message", "level": "info", "message": "from a zombie", "data": {}}


def zombie_writes(queue: Any, name: str) -> tuple[bool, bool]:
    """Let a claim expire, claim the job anew, and write under the old claim: (said it wrote, changed anything)."""
    job_id = queue.enqueue()
    zombie = queue.claimed(worker="old")
    let_expire(queue, job_id)
    assert queue.claimed(worker="new").job_id == job_id
    before = snapshot(queue)
    with transaction(queue.sessions) as session:
        said = WRITES[name](queue, session, zombie)
    return bool(said), snapshot(queue) != before


@pytest.mark.parametrize("name", WRITES)
def test_a_stale_claim_writes_nothing(queue: Any, name: str) -> None:
    assert zombie_writes(queue, name) == (False, False)


@pytest.mark.parametrize("name", WRITES)
def test_without_the_fence_the_test_above_would_fail(queue: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutation of the product: a guard that forgets the fence lets the zombie write."""
    monkeypatch.setattr(leases, "guard", lambda claim: and_(Job.id == claim.job_id, Job.state == "running"))
    assert zombie_writes(queue, name) == (True, True)


def test_a_claim_writes_nothing_after_the_job_has_ended(queue: Any) -> None:
    queue.enqueue()
    claim = queue.claimed()
    with transaction(queue.sessions) as session:
        assert outcomes.fail(session, claim, error={"code": "x", "message": "x"})
    for write in WRITES.values():
        with transaction(queue.sessions) as session:
            assert not write(queue, session, claim)


def test_lost_leases_without_progress_end_in_a_crash_loop(queue: Any) -> None:
    job_id = queue.enqueue()
    for _ in range(3):
        queue.claimed()
        let_expire(queue, job_id)
    assert queue.claim() is None
    job = queue.job(job_id)
    assert (job.state, job.error["code"], job.crashes) == ("failed", "crash_loop", 3)
    assert "stopped renewing its lease" in job.error["message"]


def test_progress_between_crashes_starts_the_count_anew(queue: Any) -> None:
    job_id = queue.enqueue()
    for step in range(1, 7):
        claim = queue.claimed()
        with transaction(queue.sessions) as session:
            leases.record(session, claim, progress={**claim.progress, "step": step, "best_step": step})
        let_expire(queue, job_id)
    assert queue.claimed().attempt == 7
    assert queue.job(job_id).crashes == 1


def test_an_expired_job_that_was_to_be_cancelled_is_cancelled(queue: Any) -> None:
    job_id = queue.enqueue()
    queue.claimed()
    with transaction(queue.sessions) as session:
        request_cancel(session, job_id)
    let_expire(queue, job_id)
    assert queue.claim() is None
    assert queue.job(job_id).state == "cancelled"


def test_heartbeats_and_records_tell_of_a_cancel(queue: Any) -> None:
    job_id = queue.enqueue()
    claim = queue.claimed()
    with transaction(queue.sessions) as session:
        request_cancel(session, job_id)
    with transaction(queue.sessions) as session:
        assert leases.heartbeat(session, claim, lease_seconds=30) == Beat(alive=True, cancel_requested=True)
        assert leases.record(session, claim, progress={}) == Beat(alive=True, cancel_requested=True)
        assert leases.check(session, claim) == Beat(alive=True, cancel_requested=True)


def test_a_job_that_waits_after_a_crash_is_not_claimed_early(queue: Any) -> None:
    job_id = queue.enqueue()
    claim = queue.claimed()
    with transaction(queue.sessions) as session:
        outcomes.crash(session, claim, error={"code": "x", "message": "x"}, max_crashes=3)
    assert queue.claim() is None
    with transaction(queue.sessions) as session:
        session.execute(update(Job).where(Job.id == job_id).values(not_before=func.now()))
    assert queue.claimed().attempt == 2


def let_expire(queue: Any, job_id: str) -> None:
    """Make the lease run out without waiting for it."""
    with transaction(queue.sessions) as session:
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=func.now() - timedelta(seconds=1)))


def snapshot(queue: Any) -> list[Any]:
    """Every row that the queue writes."""
    with queue.sessions() as session:
        tables = [table.__table__ for table in (Job, Attempt, Event, Outbox)]
        return [[tuple(row) for row in session.execute(select(table).order_by(table.c.id))] for table in tables]
