"""How a job ends without success, and what a crash does to it: another try after a short wait, or the end of a crash loop.

Only crashes without progress add up: a job that got further than it was at its last crash starts counting anew, so that a
long training on machines that come and go is not failed, while one that dies at the same place is.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import func
from sqlalchemy.orm import Session

from parampara.db.models import Job
from parampara.execution import hooks
from parampara.execution.events import announce, job_state

_LONGEST_WAIT_SECONDS = 60.0


def count_crash(session: Session, job: Job, *, error: dict[str, Any], max_crashes: int, wait: bool = False) -> None:
    """Count a crash of a job whose attempt has just ended; with ``wait`` it is claimable only after 1, 2, 4... seconds."""
    best, last = job.progress.get("best_step", 0), job.progress.get("crash_step", -1)
    job.crashes = job.crashes + 1 if best <= max(last, 0) else 1
    job.progress = {**job.progress, "crash_step": best}
    job.owner = job.lease_until = None
    if job.cancel_requested:
        end(session, job, "cancelled", {"code": "cancelled", "message": "cancelled on request"})
    elif job.crashes >= max_crashes:
        message = f"crashed {job.crashes} times without progress; the last time: {error['message']}"
        end(session, job, "failed", {**error, "code": "crash_loop", "message": message})
    else:
        job.state = "queued"
        delay = min(2.0 ** (job.crashes - 1), _LONGEST_WAIT_SECONDS) if wait else 0
        job.not_before = func.now() + timedelta(seconds=delay)
        job_state(session, job, f"{job.name} queued again after a crash ({job.crashes} of {max_crashes}): {error['message']}", level="warn")
        announce(session, job)


def end(session: Session, job: Job, state: str, error: dict[str, Any]) -> None:
    """Make a job ``failed`` or ``cancelled``, with everything that hangs on it; the caller settles its run."""
    job.state, job.error = state, error
    job.owner = job.lease_until = None
    job.finished_at = func.now()
    job_state(session, job, f"{job.name} {state}: {error['message']}", level="error" if state == "failed" else "info")
    hooks.on_end_without_success(session, job)
