"""A small library in a vector store, made the way the platform makes it: real files, real ingest stage, real embedder, real pgvector."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import select

from ingestor import ingest
from parampara.db.models import Alias, File, Job, new_id
from parampara.execution import hooks
from parampara.files import path_of
from parampara.progress import SilentProgress
from parampara.schemas.ingest import IngestConfig, IngestDocument
from tests.gateway.conftest import Running

DASHA = """# Vimshottari periods

Ketu rules for seven years, Venus for twenty years and the Sun for six years in the Vimshottari cycle.

The Moon rules for ten years, Mars for seven, Rahu for eighteen, Jupiter for sixteen, Saturn for nineteen, Mercury for seventeen.
"""
MARRIAGE = """# Marriage

The sub lord of the seventh cusp decides marriage. If it signifies the houses two, seven and eleven, marriage is promised.

Saptam bhav ka sub lord agar do, saat aur gyarah bhav ka karak ho, to shaadi ka vaada hota hai.
"""
TRAVEL = """# Travel

Foreign travel is read from the twelfth cusp; the houses three, nine and twelve must be signified.
"""
BOOKS = {"dasha.md": DASHA, "marriage.md": MARRIAGE, "travel.md": TRAVEL}


@pytest.fixture
def platform(start_gateway: Callable[..., Running], embedder_url: str) -> Running:
    return start_gateway(embedder_url=embedder_url)


def add_file(gateway: Running, filename: str, text: str) -> str:
    """A file as the control plane stores it."""
    file_id = new_id("file-")
    path = path_of(gateway.settings, file_id, filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    with gateway.sessions.begin() as session:
        session.add(File(id=file_id, filename=filename, purpose="assistants", bytes=len(text), sha256="0" * 64))
    return file_id


def run_ingest_jobs(gateway: Running, workdir: Path) -> None:
    """What the worker does with each queued ingest job: run the stage, then the finishing transaction."""
    with gateway.sessions() as session:
        jobs = session.scalars(select(Job).where(Job.kind == "ingest", Job.state == "queued")).all()
    for job in jobs:
        with gateway.sessions.begin() as session:
            job = session.get_one(Job, job.id)
            files = [session.get_one(File, reference["file"]) for reference in job.spec["inputs"]["documents"]]
            documents = [
                IngestDocument(file_id=file.id, filename=file.filename, path=path_of(gateway.settings, file.id, file.filename))
                for file in files
            ]
            config = IngestConfig(
                vector_store_id=job.spec["vector_store_id"],
                documents=documents,
                embedder_url=gateway.settings.gateway.embedder_url,
                embedding_model=gateway.settings.embedder.model,
                **job.spec["params"],
            )
            result = ingest.run(config, workdir=workdir / job.id, progress=SilentProgress())
            job.state, job.result = "succeeded", result.model_dump(mode="json")
            hooks.on_success(session, job, None, settings=gateway.settings, output=result.output)


@pytest.fixture
def store(platform: Running, tmp_path: Path) -> str:
    """A filled vector store, attached to ``kp``."""
    file_ids = [add_file(platform, name, text) for name, text in BOOKS.items()]
    store = platform.sdk.vector_stores.create(
        name="KP",
        file_ids=file_ids,
        chunking_strategy={"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 0}},
    )
    run_ingest_jobs(platform, tmp_path / "work")
    with platform.sessions.begin() as session:
        session.get_one(Alias, "kp").vector_store_id = store.id
    time.sleep(0.6)
    return store.id
