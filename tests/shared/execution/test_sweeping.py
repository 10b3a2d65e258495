"""What killed workers leave on disk is removed, and nothing else is."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, update

from parampara.db.models import Job
from parampara.db.session import transaction
from parampara.execution.sweeping import sweep
from parampara.storage import LocalStorage


def test_half_published_artifacts_go_when_they_are_old(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "a").write_text("a")
    kept = storage.publish(tmp_path / "made", kind="report")
    left = tmp_path / "staging" / "0123"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert storage.sweep() == []  # somebody may be at it
    assert storage.sweep(older_than_seconds=-1) == [left]
    assert list((tmp_path / "staging").iterdir()) == []
    storage.verify(kept.id)


def test_checkpoints_go_when_their_job_has_succeeded_long_ago(queue: Any) -> None:
    long_ago, just_now, failed, waiting = jobs = [queue.enqueue() for _ in range(4)]
    for job_id in jobs:
        for name in ("checkpoints/step", "progress.jsonl"):
            path = queue.settings.work_dir / job_id / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    (queue.settings.work_dir / "lost+found").mkdir()
    with transaction(queue.sessions) as session:
        ended = {long_ago: ("succeeded", 2), just_now: ("succeeded", 0), failed: ("failed", 2)}
        for job_id, (state, hours) in ended.items():
            values = {"state": state, "finished_at": func.now() - timedelta(hours=hours)}
            session.execute(update(Job).where(Job.id == job_id).values(values))
    assert sweep(queue.sessions, queue.settings) == [queue.settings.work_dir / long_ago]
    assert [path.name for path in (queue.settings.work_dir / long_ago).iterdir()] == ["progress.jsonl"]
    assert all((queue.settings.work_dir / job_id / "checkpoints" / "step").is_file() for job_id in (just_now, failed, waiting))
    assert sweep(queue.sessions, queue.settings) == []


def test_a_name_that_is_not_a_directory_is_passed_over(queue: Any) -> None:
    queue.settings.work_dir.mkdir(parents=True)
    (queue.settings.work_dir / "job_file").write_text("x")
    assert sweep(queue.sessions, queue.settings) == []
