"""Away with what killed workers left on disk: half-published artifacts, and the checkpoints of jobs that have succeeded."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Job
from parampara.db.session import transaction
from parampara.execution import products
from parampara.settings import Settings
from parampara.storage import LocalStorage

_SETTLED_FOR = timedelta(hours=1)
"""A worker that has just written a success still cleans up by itself."""


def sweep(sessions: sessionmaker[Session], settings: Settings) -> list[Path]:
    """Remove both, as far as this process may; returns the directories that were taken away or emptied."""
    removed = LocalStorage(settings.artifacts_dir).sweep()
    workdirs = {path.name: path for path in settings.work_dir.glob("job_*") if _holds_directories(path)}
    if not workdirs:
        return removed
    with transaction(sessions) as session:
        over = select(Job.id).where(Job.id.in_(workdirs), Job.state == "succeeded", Job.finished_at < func.now() - _SETTLED_FOR)
        finished = list(session.scalars(over))
    for job_id in finished:
        products.clean(workdirs[job_id])
    return removed + [workdirs[job_id] for job_id in finished]


def _holds_directories(path: Path) -> bool:
    return path.is_dir() and any(entry.is_dir() and not entry.is_symlink() for entry in path.iterdir())
