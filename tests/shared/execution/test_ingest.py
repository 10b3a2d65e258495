"""Ingest jobs: chunks come in with the transaction that ends the job, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import delete, select

from parampara.db.models import Chunk, VectorStore, VectorStoreFile
from parampara.db.session import transaction
from parampara.execution.queue import enqueue_job, request_cancel, retry_job
from parampara.plan import ingest_spec


@pytest.fixture
def ingest(queue: Any) -> Any:
    """Attach documents with these texts to a store and queue their ingestion; returns (job id, file ids)."""

    def start(*texts: str) -> tuple[str, list[str]]:
        ids = [queue.upload(text, f"{number}.txt") for number, text in enumerate(texts)]
        with transaction(queue.sessions) as session:
            session.merge(VectorStore(id="vs_1", embedding_model="tiny"))
            job = enqueue_job(session, kind="ingest", spec=ingest_spec(vector_store_id="vs_1", file_ids=ids))
            session.add_all(VectorStoreFile(vector_store_id="vs_1", file_id=file_id, chunking={}, job_id=job.id) for file_id in ids)
            return job.id, ids

    return start


def files(queue: Any) -> dict[str, VectorStoreFile]:
    with queue.sessions() as session:
        return {row.file_id: row for row in session.scalars(select(VectorStoreFile))}


def test_chunks_are_searchable_and_the_files_completed(queue: Any, ingest: Any) -> None:
    job_id, (book, empty) = ingest("line one\nline two", "")
    assert queue.work() == ["ingest:succeeded"]
    with queue.sessions() as session:
        nearest = select(Chunk).order_by(Chunk.embedding.cosine_distance([1.0, 0.0, 0.5]), Chunk.position)
        rows = [(row.file_id, row.filename, row.position, row.text, row.tokens) for row in session.scalars(nearest)]
    assert rows == [(book, "0.txt", 0, "line one", 2), (book, "0.txt", 1, "line two", 2)]
    done = files(queue)
    assert (done[book].status, done[book].usage_bytes) == ("completed", 2 * (8 + 3 * 4))
    assert (done[empty].status, done[empty].last_error) == ("failed", {"code": "invalid_file", "message": "the document is empty"})
    assert queue.job(job_id).artifact_id is None


def test_ingesting_again_replaces_the_chunks(queue: Any, ingest: Any) -> None:
    _, (book,) = ingest("one\ntwo")
    queue.work()
    with transaction(queue.sessions) as session:
        again = enqueue_job(session, kind="ingest", spec=ingest_spec(vector_store_id="vs_1", file_ids=[book]))
        session.get_one(VectorStoreFile, ("vs_1", book)).job_id = again.id
    queue.work()
    with queue.sessions() as session:
        assert session.scalars(select(Chunk.text).order_by(Chunk.position)).all() == ["one", "two"]


def test_a_file_detached_meanwhile_gets_no_chunks(queue: Any, ingest: Any) -> None:
    _, (kept, detached) = ingest("one", "two")
    with transaction(queue.sessions) as session:
        session.execute(delete(VectorStoreFile).where(VectorStoreFile.file_id == detached))
    queue.work()
    with queue.sessions() as session:
        assert session.scalars(select(Chunk.file_id)).all() == [kept]


def test_a_deleted_store_fails_the_job_and_a_retry_puts_the_files_back(queue: Any, ingest: Any) -> None:
    job_id, (book,) = ingest("one")
    with transaction(queue.sessions) as session:
        session.get_one(VectorStore, "vs_1").deleted_at = session.get_one(VectorStore, "vs_1").created_at
    assert queue.work() == ["ingest:failed"]
    assert (files(queue)[book].status, queue.job(job_id).error["code"]) == ("failed", "not_found")
    with transaction(queue.sessions) as session:
        session.get_one(VectorStore, "vs_1").deleted_at = None
        retry_job(session, job_id)
    assert files(queue)[book].status == "in_progress"
    assert queue.work() == ["ingest:succeeded"]
    assert files(queue)[book].status == "completed"


def test_a_cancelled_ingest_cancels_its_files(queue: Any, ingest: Any) -> None:
    job_id, (book,) = ingest("one")
    with transaction(queue.sessions) as session:
        request_cancel(session, job_id)
    assert (files(queue)[book].status, files(queue)[book].last_error) == ("cancelled", None)
