"""How an attempt ends, each in one guarded transaction. Every function returns the end that it wrote, which is ``cancelled``
for a success that somebody has cancelled meanwhile; or None when the claim no longer held: then the attempt was stale, and
nothing of it was written.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from parampara.db.models import Artifact, Job
from parampara.execution import hooks
from parampara.execution.endings import count_crash, end
from parampara.execution.events import announce, job_event, job_state
from parampara.execution.leases import Claim, close_attempt, hold
from parampara.execution.runs import FAILED_BY_GATE, HELD_BY_GATE, lock_run, settle
from parampara.manifest import Manifest
from parampara.settings import Settings

_CANCELLED = {"code": "cancelled", "message": "cancelled on request"}


def succeed(
    session: Session,
    claim: Claim,
    *,
    settings: Settings,
    result: dict[str, Any],
    manifest: Manifest | None = None,
    output: Path | None = None,
    log_tail: str | None = None,
) -> str | None:
    """The stage ended well: its result and artifact become the job's, and the run moves on. ``held``: a gate withheld a deployment."""
    if (job := hold(session, claim)) is None:
        return None
    if job.cancel_requested:
        return cancel(session, claim, exit_code=0, log_tail=log_tail)
    if manifest is not None:
        values = {
            "id": manifest.id,
            "kind": manifest.kind,
            "bytes": manifest.total_bytes,
            "parents": manifest.parents,
            "manifest": manifest.model_dump(mode="json"),
            "job_id": job.id,
        }
        session.execute(insert(Artifact).values(values).on_conflict_do_nothing(index_elements=[Artifact.id]))
        job.artifact_id = manifest.id
    close_attempt(session, job.id, claim.fence, "succeeded", exit_code=0, log_tail=log_tail)
    if job.kind == "deploy" and result.get("decision", "promote") != "promote":
        return _withhold(session, job, result)
    _succeeded(session, claim, job, settings=settings, result=result, output=output)
    return "succeeded"


def reuse(session: Session, claim: Claim, *, settings: Settings, source: Job) -> str | None:
    """An earlier job made the same: take its artifact and result."""
    if (job := hold(session, claim)) is None:
        return None
    if job.cancel_requested:
        return cancel(session, claim)
    job.artifact_id, job.reused_from = source.artifact_id, source.reused_from or source.id  # where the work was done, and its curve is
    job_event(
        session,
        job,
        f"{job.name} reused from {source.id}: equal inputs, parameters and version",
        attempt=claim.attempt,
        artifact_id=source.artifact_id,
    )
    close_attempt(session, job.id, claim.fence, "succeeded")
    _succeeded(session, claim, job, settings=settings, result=dict(source.result or {}), output=None)
    return "reused"


def fail(session: Session, claim: Claim, *, error: dict[str, Any], exit_code: int | None = None, log_tail: str | None = None) -> str | None:
    """The stage said that trying again is no use (bad input, divergence, out of memory)."""
    if (job := hold(session, claim)) is None:
        return None
    close_attempt(session, job.id, claim.fence, "failed", exit_code=exit_code, error=error, log_tail=log_tail)
    end(session, job, "failed", error)
    settle(session, lock_run(session, job.run_id))
    return "failed"


def crash(
    session: Session, claim: Claim, *, error: dict[str, Any], max_crashes: int, exit_code: int | None = None, log_tail: str | None = None
) -> str | None:
    """The stage died: queued again after a short wait, or failed after too many crashes. ``exit_code`` is -N for signal N."""
    if (job := hold(session, claim)) is None:
        return None
    close_attempt(session, job.id, claim.fence, "crashed", exit_code=exit_code, error=error, log_tail=log_tail)
    count_crash(session, job, error=error, max_crashes=max_crashes, wait=True)
    settle(session, lock_run(session, job.run_id))
    return "crashed"


def release(
    session: Session, claim: Claim, *, reason: str, wait_seconds: float = 0, exit_code: int | None = None, log_tail: str | None = None
) -> str | None:
    """The attempt was stopped through no fault of the job: queued again, nothing counted against it."""
    if (job := hold(session, claim)) is None:
        return None
    close_attempt(
        session, job.id, claim.fence, "preempted", exit_code=exit_code, error={"code": "preempted", "message": reason}, log_tail=log_tail
    )
    if job.cancel_requested:
        end(session, job, "cancelled", _CANCELLED)
    else:
        job.state, job.owner, job.lease_until = "queued", None, None
        job.not_before = func.now() + timedelta(seconds=wait_seconds) if wait_seconds else None
        job_state(session, job, f"{job.name} queued again: {reason}", attempt=claim.attempt)
        announce(session, job)
    session.flush()
    settle(session, lock_run(session, job.run_id))
    return "cancelled" if job.state == "cancelled" else "preempted"


def cancel(session: Session, claim: Claim, *, exit_code: int | None = None, log_tail: str | None = None) -> str | None:
    """The stage was stopped because somebody asked for it."""
    if (job := hold(session, claim)) is None:
        return None
    close_attempt(session, job.id, claim.fence, "cancelled", exit_code=exit_code, error=_CANCELLED, log_tail=log_tail)
    end(session, job, "cancelled", _CANCELLED)
    settle(session, lock_run(session, job.run_id))
    return "cancelled"


def _withhold(session: Session, job: Job, result: dict[str, Any]) -> str:
    """The model was served and measured, and a gate on the live endpoint was missed: no alias moves."""
    job.result, decision, run = result, result["decision"], lock_run(session, job.run_id)
    told = f"the live endpoint missed {hooks.tell_missed(session, job)}"
    code = HELD_BY_GATE if decision == "hold" else FAILED_BY_GATE
    end(session, job, "cancelled", {"code": code, "message": told, "param": "recipe.gates"})
    if run is not None:
        run.gate = decision
        if decision == "fail":
            run.error = {"code": "gate_failed", "message": told, "param": "recipe.gates"}
    session.flush()
    settle(session, run)
    return "held"


def _succeeded(session: Session, claim: Claim, job: Job, *, settings: Settings, result: dict[str, Any], output: Path | None) -> None:
    job.state, job.result, job.error = "succeeded", result, None
    job.owner = job.lease_until = None
    job.finished_at = func.now()
    job_state(session, job, f"{job.name} succeeded", attempt=claim.attempt)
    session.flush()
    run = lock_run(session, job.run_id)
    hooks.on_success(session, job, run, settings=settings, output=output)
    session.flush()
    settle(session, run)
