"""kill -9 of the real workers in the middle of DAPT, SFT, merge and quantize: the run still ends succeeded.

Real services, real training on a tiny model, real Postgres and Redis. Each stage loses its worker once while its process is
alive; a sampler looks all the while for two stage processes on one job.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Attempt, File, Job, Run
from parampara.db.session import transaction
from parampara.execution.queue import create_run
from parampara.files import path_of
from parampara.schemas.recipe import parse_recipe
from parampara.settings import Settings
from parampara.storage import LocalStorage
from tests.tiny_models import make_model

SERVICES = {"train": "trainer", "merge": "merger", "quantize": "quantizer", "evaluate": "evaluator"}
KILLED = ["dapt", "merge_dapt", "sft", "merge", "quantize"]
PLANETS = ["Ketu", "Venus", "Sun", "Moon", "Mars", "Rahu", "Jupiter", "Saturn", "Mercury"]
TRAIN = {
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_seq_length": 64,
    "checkpoint_steps": 1,
    "gradient_checkpointing": False,
    "precision": "float32",
}
RECIPE = {
    "name": "kill",
    "base_model": "tiny",
    "backend": "trl",
    "stages": {
        "dapt": {"lora": {"r": 4}, "train": {**TRAIN, "packing": True}, "chunk_tokens": 64},
        "sft": {"lora": {"r": 4}, "train": {**TRAIN, "packing": False}},
        "quantize": {"schemes": ["bitsandbytes"], "max_questions": 2, "max_chunks": 2},
        "evaluate": {"max_new_tokens": 4, "max_questions": 2, "max_chunks": 2, "parity_prompts": 2},
        "deploy": None,
    },
}


class Workers:
    """One real worker process per queue."""

    def __init__(self, settings: Settings) -> None:
        self._environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PARAMPARA_HOME": str(settings.home),
            "PARAMPARA_DATABASE__URL": settings.database.url,
            "PARAMPARA_REDIS__URL": settings.redis.url,
            "PARAMPARA_BASE_MODELS": json.dumps(settings.base_models),
            "PARAMPARA_WORKER__LEASE_SECONDS": "3",
            "PARAMPARA_WORKER__HEARTBEAT_SECONDS": "0.7",
            "PARAMPARA_WORKER__POLL_SECONDS": "0.5",
        }
        self._processes = {queue: self._start(queue) for queue in SERVICES}

    def kill_and_restart(self, queue: str) -> None:
        self._processes[queue].kill()
        self._processes[queue].wait(10)
        self._processes[queue] = self._start(queue)

    def stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def _start(self, queue: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", SERVICES[queue], "worker"], env=self._environment)


class Sampler:
    """Looks for stage processes by the workdir in their command line; remembers the most it ever saw on one job."""

    def __init__(self, work_dir: Path) -> None:
        self.most = 0
        self.seen: dict[str, set[int]] = {}
        self._work_dir = str(work_dir)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def pids(self, job_id: str) -> set[int]:
        return self.seen.get(job_id, set())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stop.wait(0.1):
            now: dict[str, set[int]] = {}
            for process in psutil.process_iter(["cmdline", "status"]):
                words = process.info["cmdline"] or []
                if "--workdir" in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                    workdir = words[words.index("--workdir") + 1]
                    if workdir.startswith(self._work_dir):
                        # a forked helper shows the same command line: it belongs to its parent's attempt
                        leader = os.getsid(process.pid) if psutil.pid_exists(process.pid) else process.pid
                        now.setdefault(Path(workdir).name, set()).add(leader)
            for job_id, pids in now.items():
                self.most = max(self.most, len(pids))
                self.seen.setdefault(job_id, set()).update(pids)


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    base = make_model(tmp_path / "base")
    return settings.model_copy(update={"base_models": {"tiny": str(base)}})


@pytest.fixture
def run_id(settings: Settings, sessions: sessionmaker[Session]) -> str:
    lines = [f"{planet} rules {7 + number} years of the dasha, and the sub lord decides." for number, planet in enumerate(PLANETS)]
    book = "\n\n".join(" ".join(lines[start:] + lines[:start]) for start in range(9)) * 2
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Case {number}: which planet is number {number % 9}?"},
                {"role": "assistant", "content": f"Answer: {PLANETS[number % 9]}\nRule: order of the dasha\nConfidence: High"},
            ],
            "metadata": {"kind": "order", "language": "english", "expected": PLANETS[number % 9]},
        }
        for number in range(40)
    ]
    datasets = {
        "books": [upload(settings, sessions, book, "book.txt")],
        "qa": [upload(settings, sessions, "".join(json.dumps(row) + "\n" for row in rows), "qa.jsonl")],
    }
    with transaction(sessions) as session:
        return create_run(session, settings=settings, recipe=parse_recipe(RECIPE), datasets=datasets).id


@pytest.fixture
def workers(settings: Settings) -> Iterator[Workers]:
    started = Workers(settings)
    yield started
    started.stop()


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_stage_survives_the_death_of_its_worker(
    settings: Settings, sessions: sessionmaker[Session], run_id: str, workers: Workers
) -> None:
    sampler = Sampler(settings.work_dir)
    try:
        for name in KILLED:
            kill_during(settings, sessions, workers, sampler, run_id, name)
        wait_for(lambda: state_of(sessions, run_id) in ("succeeded", "failed", "cancelled"), 600)
    finally:
        sampler.stop()
    with sessions() as session:
        run = session.get_one(Run, run_id)
        jobs = {job.name: job for job in session.scalars(select(Job).where(Job.run_id == run_id))}
        attempts = {
            name: list(session.scalars(select(Attempt.state).where(Attempt.job_id == job.id).order_by(Attempt.number)))
            for name, job in jobs.items()
        }
    assert run.state == "succeeded", run.error
    for name in KILLED:
        assert attempts[name] == ["lost", "succeeded"], name
    assert sampler.most == 1, "two stage processes worked on one job at the same time"
    storage = LocalStorage(settings.artifacts_dir)
    for job in jobs.values():
        storage.verify(str(job.artifact_id))
    assert (jobs["dapt"].result or {})["resumed_from_step"] > 0
    assert (jobs["sft"].result or {})["resumed_from_step"] > 0


def kill_during(settings: Settings, sessions: sessionmaker[Session], workers: Workers, sampler: Sampler, run_id: str, name: str) -> None:
    """Wait until the stage's process is at work (a training: until it has a checkpoint), then kill -9 its worker."""
    with sessions() as session:
        job = session.scalars(select(Job).where(Job.run_id == run_id, Job.name == name)).one()
    progress = settings.work_dir / job.id / "progress.jsonl"

    def at_work() -> bool:
        assert state_of(sessions, run_id) not in ("failed", "cancelled"), "the run ended early"
        text = progress.read_text() if progress.exists() else ""
        begun = '"step": 3' in text if job.kind in ("dapt", "sft") else bool(text)
        return begun and bool(sampler.pids(job.id))

    wait_for(at_work, 300)
    workers.kill_and_restart(job.queue)


def upload(settings: Settings, sessions: sessionmaker[Session], text: str, filename: str) -> str:
    file_id = "file-" + os.urandom(12).hex()
    path = path_of(settings, file_id, filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with transaction(sessions) as session:
        digest = hashlib.sha256(text.encode()).hexdigest()
        session.add(File(id=file_id, filename=filename, purpose="fine-tune", bytes=len(text), sha256=digest))
    return file_id


def state_of(sessions: sessionmaker[Session], run_id: str) -> str:
    with sessions() as session:
        return session.get_one(Run, run_id).state


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.05)
