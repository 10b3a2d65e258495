"""The queue on a real database, with the ``sleepy`` service as the stages."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import File, Job, Run
from parampara.db.session import transaction
from parampara.execution import leases
from parampara.execution.preloaded import Preloaded
from parampara.execution.queue import create_run, enqueue_job
from parampara.execution.supervisor import Supervisor
from parampara.files import path_of
from parampara.plan import QUEUES
from parampara.schemas.recipe import parse_recipe
from parampara.settings import Settings

STAGES = Path(__file__).parents[2] / "chaos" / "stages"
PYTHONPATH = os.pathsep.join([str(STAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
"""With the service ``sleepy`` in front of whatever this test run was given."""


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    """With a base model that has the files of one."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    return settings.model_copy(update={"base_models": {"tiny": str(base)}})


class Queue:
    """What a test does to the queue, each in one transaction of its own."""

    def __init__(self, settings: Settings, sessions: sessionmaker[Session]) -> None:
        self.settings, self.sessions = settings, sessions
        self.stopping = threading.Event()
        self.preloaded: Preloaded | None = None

    def upload(self, text: str, filename: str = "book.txt") -> str:
        file_id = "file-" + os.urandom(12).hex()
        path = path_of(self.settings, file_id, filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        with transaction(self.sessions) as session:
            session.add(File(id=file_id, filename=filename, purpose="user_data", bytes=len(text), sha256=digest))
        return file_id

    def book(self, **orders: Any) -> str:
        return self.upload(json.dumps({"steps": 3, "seconds": 0, **orders}))

    def enqueue(self, **orders: Any) -> str:
        """A training job outside any run."""
        inputs = {"model": [{"base": "tiny"}], "train": [{"file": self.book(**orders)}], "validation": []}
        with transaction(self.sessions) as session:
            spec = {"inputs": inputs, "params": {}, "backend": "auto", "seed": 42, "reuse": False}
            return enqueue_job(session, kind="dapt", spec=spec).id

    def start_run(
        self,
        *,
        gates: list[dict[str, Any]] | None = None,
        deploy: Any = "kp",
        evaluate: dict[str, Any] | None = None,
        dpo: dict[str, Any] | None = None,
        seed: int = 42,
        **options: Any,
    ) -> str:
        datasets = options.pop("datasets", None) or {"books": [self.book()], "qa": [self.upload("{}", "qa.jsonl")]}
        stages = {"deploy": {"alias": deploy} if isinstance(deploy, str) else deploy, "evaluate": evaluate or {}, "dpo": dpo}
        recipe = parse_recipe({"name": "r", "base_model": "tiny", "seed": seed, "gates": gates or [], "stages": stages})
        with transaction(self.sessions) as session:
            return create_run(session, settings=self.settings, recipe=recipe, datasets=datasets, **options).id

    def claim(self, queue: str = "train", *, worker: str = "w", lease_seconds: float = 30) -> leases.Claim | None:
        return leases.take(self.sessions, queue=queue, worker=worker, lease_seconds=lease_seconds, max_crashes=3)

    def claimed(self, queue: str = "train", **options: Any) -> leases.Claim:
        claim = self.claim(queue, **options)
        assert claim is not None
        return claim

    def run(self, claim: leases.Claim) -> str:
        return Supervisor(self.settings, self.sessions, service="sleepy", stopping=self.stopping, preloaded=self.preloaded).run(claim)

    def work(self) -> list[str]:
        """Run everything that is queued, and what follows from it; returns ``<job>:<outcome>`` in order."""
        done = []
        while claims := [claim for queue in dict.fromkeys(QUEUES.values()) if (claim := self.claim(queue))]:
            done += [f"{claim.name}:{self.run(claim)}" for claim in claims]
        return done

    def job(self, job_id: str) -> Job:
        with self.sessions() as session:
            return session.get_one(Job, job_id)

    def jobs(self, run_id: str) -> dict[str, Job]:
        with self.sessions() as session:
            return {job.name: job for job in session.query(Job).where(Job.run_id == run_id).order_by(Job.position)}

    def states(self, run_id: str) -> dict[str, str]:
        return {name: job.state for name, job in self.jobs(run_id).items()}

    def the_run(self, run_id: str) -> Run:
        with self.sessions() as session:
            return session.get_one(Run, run_id)


@pytest.fixture
def queue(settings: Settings, sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH)
    return Queue(settings, sessions)
