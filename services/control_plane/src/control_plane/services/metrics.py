"""Loss curves: the step reports of a job, from its progress file where this server sees it, else from its events."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from parampara.db.models import Event, Job
from parampara.schemas.api import JobMetrics, MetricPoint
from parampara.settings import Settings

PROGRESS_FILE = "progress.jsonl"


def of_job(session: Session, settings: Settings, job: Job, *, points: int) -> JobMetrics:
    """At most ``points`` evenly spaced points, first and last among them. A reused job shows the curve of the job it was taken from."""
    source = job.reused_from or job.id
    path = settings.work_dir / source / PROGRESS_FILE
    if path.is_file():
        data, origin = collect(_file_records(path)), "progress"
    else:
        rows = session.scalars(select(Event).where(Event.job_id == source, Event.type.in_(("message", "metrics"))).order_by(Event.id))
        data, origin = collect(record for row in rows for record in _event_records(row)), "events"
    return JobMetrics.model_validate({"job_id": job.id, "source": origin if data else "none", "data": thin(data, points)})


def collect(records: Iterable[dict[str, Any]]) -> list[MetricPoint]:
    """One point per phase and step. A resumed attempt reports steps again: the newest report of a metric counts."""
    points: dict[tuple[str | None, int], MetricPoint] = {}
    phase: str | None = None
    for record in records:
        if record.get("type") == "phase":
            phase = record.get("phase")
        elif record.get("type") == "step" and isinstance(record.get("step"), int):
            point = points.setdefault((phase, record["step"]), MetricPoint(step=record["step"], phase=phase, metrics={}))
            point.total, point.t = record.get("total"), record.get("t")
            point.metrics.update(record.get("metrics") or {})
    return list(points.values())


def thin(points: list[MetricPoint], limit: int) -> list[MetricPoint]:
    if len(points) <= limit:
        return points
    return [points[round(index * (len(points) - 1) / (limit - 1))] for index in range(limit)]


def _event_records(event: Event) -> Iterator[dict[str, Any]]:
    """An event as the lines of the progress file that :class:`parampara.execution.watch.ProgressBook` made it from."""
    if event.type == "message":
        if event.data == {"phase": event.message}:
            yield {"type": "phase", "phase": event.message}
        return
    for point in event.data.get("points", []):
        yield {"type": "step", "t": event.created_at.timestamp(), "total": event.data.get("total"), **point}


def _file_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:  # the line that is being written, or the last one before a kill
                continue
            if isinstance(record, dict):
                yield record
