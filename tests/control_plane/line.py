"""Plays a worker with the queue's own functions: claims, reports, publishes and finishes, without any training.

The control plane is under test here, and it only ever sees a worker's rows.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Deployment, Job
from parampara.db.session import transaction
from parampara.execution import hooks, leases, outcomes
from parampara.manifest import Manifest
from parampara.plan import ARTIFACT_KINDS
from parampara.settings import Settings
from parampara.storage import LocalStorage

QUEUES = ("train", "merge", "quantize", "evaluate", "deploy")


def claim_next(sessions: sessionmaker[Session], queue: str) -> leases.Claim | None:
    return leases.take(sessions, queue=queue, worker="worker-1", lease_seconds=30, max_crashes=3)


def finish(sessions: sessionmaker[Session], settings: Settings, claim: leases.Claim) -> None:
    """End a claimed job well, with a real artifact in the store."""
    with transaction(sessions) as session:
        job = session.get_one(Job, claim.job_id)
        spec = dict(job.spec)
    manifest = None if ARTIFACT_KINDS[claim.kind] is None else _publish(settings, claim)
    with transaction(sessions) as session:
        if claim.kind == "deploy":
            _start(session, claim, spec)
        assert outcomes.succeed(session, claim, settings=settings, result=_result(claim), manifest=manifest, log_tail="done")


def work_through(sessions: sessionmaker[Session], settings: Settings, run_id: str) -> None:
    """Finish every job of a run in order."""
    while True:
        claims = [claim for queue in QUEUES if (claim := claim_next(sessions, queue)) is not None]
        if not claims:
            break
        for claim in claims:
            finish(sessions, settings, claim)
    with transaction(sessions) as session:
        states = set(session.scalars(select(Job.state).where(Job.run_id == run_id)))
        assert states == {"succeeded"}, states


def fail_next(sessions: sessionmaker[Session], settings: Settings, queue: str, *, message: str, code: str) -> None:
    claim = claim_next(sessions, queue)
    assert claim is not None
    with transaction(sessions) as session:
        error = {"code": code, "message": message}
        assert outcomes.fail(session, claim, error=error, exit_code=76, log_tail="its last words")


def _publish(settings: Settings, claim: leases.Claim) -> Manifest:
    kind = ARTIFACT_KINDS[claim.kind]
    assert kind is not None
    output = settings.work_dir / claim.job_id / "output"
    (output / "sub").mkdir(parents=True)
    (output / "product.txt").write_text(f"{claim.name} of {claim.job_id}")
    (output / "sub" / "more.txt").write_text("more")
    return LocalStorage(settings.artifacts_dir).publish(output, kind=kind, config={"made_by": claim.name}, versions={"torch": "2.13.0"})


def _start(session: Session, claim: leases.Claim, spec: dict[str, Any]) -> Deployment:
    job = session.get_one(Job, claim.job_id)
    artifact_id = spec["inputs"]["model"][0].get("artifact")
    model = spec.get("model")
    if model is None:
        run_jobs = select(Job).where(Job.run_id == job.run_id, Job.name == "quantize")
        artifact_id = session.scalars(run_jobs).one().artifact_id
        model = _run_model(session, job)
    return hooks.open_deployment(session, job, model=model, artifact_id=str(artifact_id))


def _run_model(session: Session, job: Job) -> str:
    from parampara.db.models import Run

    return str(session.get_one(Run, job.run_id).model)


def _result(claim: leases.Claim) -> dict[str, Any]:
    if claim.kind == "deploy":
        metrics = {"parity.live.top1": 0.99}
        return {"url": "http://127.0.0.1:8002", "generation": 1, "metrics": metrics, "gates": [], "decision": "promote"}
    if claim.kind == "evaluate":
        gate = {"metric": "exact.sft", "value": 0.7, "min": 0.5, "max": None, "action": "hold", "passed": True}
        return {"decision": "promote", "gates": [gate], "metrics": {"exact.sft": 0.7}}
    return {"seconds": 1.0}
