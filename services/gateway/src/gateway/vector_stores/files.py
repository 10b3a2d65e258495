"""Files of a vector store: attaching queues an ingest job; the job's end writes the chunks. All inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from gateway.vector_stores.schemas import AttachFile, BatchObject, FileCounts, FileStatus, LastError, StaticStrategyObject, StoreFileObject
from gateway.vector_stores.stores import Order, get, page
from parampara.db.models import Chunk, Job, VectorStoreFile
from parampara.errors import NotFound, WrongState
from parampara.execution.queue import enqueue_job, request_cancel
from parampara.files import get_files
from parampara.plan import ingest_spec

BATCH_PREFIX = "vsfb_"
MAX_FILES = 10_000
_OVER = ("succeeded", "failed", "cancelled")


def attach(session: Session, store_id: str, attachments: Sequence[AttachFile]) -> list[str]:
    """Attach files and queue their ingestion, one job per chunk size; returns the job ids.

    A file that is attached already with the same chunking, and has not failed, is left as it is: the SDK repeats a request
    whose answer got lost.

    Raises:
        NotFound: no such store or file.
        WrongState: the store would hold too many files.
    """
    get(session, store_id, lock=True)
    get_files(session, [item.file_id for item in attachments], param="file_id", lock=True)
    present = {row.file_id: row for row in session.scalars(select(VectorStoreFile).where(VectorStoreFile.vector_store_id == store_id))}
    if len(present.keys() | {item.file_id for item in attachments}) > MAX_FILES:
        raise WrongState(f"A vector store holds at most {MAX_FILES} files.", param="file_id")
    due: dict[tuple[int, int], list[VectorStoreFile]] = {}
    for item in attachments:
        row = _row(session, store_id, item, present)
        if row is not None:
            due.setdefault((row.chunking["max_chunk_size_tokens"], row.chunking["chunk_overlap_tokens"]), []).append(row)
    session.flush()
    return [_enqueue(session, store_id, rows, *sizes) for sizes, rows in due.items()]


def _row(session: Session, store_id: str, item: AttachFile, present: dict[str, VectorStoreFile]) -> VectorStoreFile | None:
    """The row to ingest, or None when it needs nothing."""
    chunking, row = item.chunking_strategy.sizes().model_dump(), present.get(item.file_id)
    if row is None:
        row = VectorStoreFile(vector_store_id=store_id, file_id=item.file_id, chunking=chunking, attributes=item.attributes or {})
        present[item.file_id] = row
        session.add(row)
        return row
    if item.attributes is not None:
        row.attributes = dict(item.attributes)
    if row.chunking == chunking and row.status in ("in_progress", "completed"):
        return None
    row.chunking, row.status, row.last_error = chunking, "in_progress", None
    return row


def _enqueue(session: Session, store_id: str, rows: list[VectorStoreFile], chunk_tokens: int, overlap: int) -> str:
    spec = ingest_spec(
        vector_store_id=store_id, file_ids=[row.file_id for row in rows], chunk_tokens=chunk_tokens, chunk_overlap_tokens=overlap
    )
    job = enqueue_job(session, kind="ingest", spec=spec)
    for row in rows:
        row.job_id = job.id
    session.flush()
    return job.id


def get_file(session: Session, store_id: str, file_id: str) -> VectorStoreFile:
    """Raises NotFound when store or attachment does not exist."""
    get(session, store_id)
    row = session.get(VectorStoreFile, (store_id, file_id))
    if row is None:
        raise NotFound(f"The file {file_id[:100]!r} is not in the vector store {store_id}.", param="file_id", code="file_not_found")
    return row


def listed(
    session: Session,
    store_id: str,
    *,
    status: FileStatus | None,
    job_id: str | None = None,
    after: str | None,
    before: str | None,
    limit: int,
    order: Order,
) -> tuple[Sequence[VectorStoreFile], bool]:
    get(session, store_id)
    query = select(VectorStoreFile).where(VectorStoreFile.vector_store_id == store_id)
    if status is not None:
        query = query.where(VectorStoreFile.status == status)
    if job_id is not None:
        query = query.where(VectorStoreFile.job_id == job_id)
    created, row_id = VectorStoreFile.created_at, VectorStoreFile.file_id
    return page(session, query, created, row_id, after=after, before=before, limit=limit, order=order)


def detach(session: Session, store_id: str, file_id: str) -> None:
    """Take a file and its chunks out of a store; the file itself stays. What a running job still brings for it is dropped."""
    row = get_file(session, store_id, file_id)
    session.execute(delete(Chunk).where(Chunk.vector_store_id == store_id, Chunk.file_id == file_id))
    session.delete(row)


def texts(session: Session, store_id: str, file_id: str) -> list[str]:
    """The chunks of a file in order."""
    get_file(session, store_id, file_id)
    query = select(Chunk.text).where(Chunk.vector_store_id == store_id, Chunk.file_id == file_id).order_by(Chunk.position)
    return list(session.scalars(query))


def batch(session: Session, store_id: str, batch_id: str) -> BatchObject:
    """A batch is the files of one ingest job, and is named after it.

    Raises:
        NotFound: no such batch in this store.
    """
    job = _job(session, store_id, batch_id)
    query = select(VectorStoreFile.status, func.count()).where(VectorStoreFile.job_id == job.id).group_by(VectorStoreFile.status)
    counts = FileCounts.model_validate(dict(session.execute(query).tuples().all()))
    counts.total = counts.in_progress + counts.completed + counts.failed + counts.cancelled
    return BatchObject(
        id=batch_id,
        created_at=int(job.created_at.timestamp()),
        vector_store_id=store_id,
        status=_batch_status(job, counts),
        file_counts=counts,
    )


def cancel_batch(session: Session, store_id: str, batch_id: str) -> BatchObject:
    job = _job(session, store_id, batch_id)
    if job.state not in _OVER:
        request_cancel(session, job.id)
    return batch(session, store_id, batch_id)


def batch_of(job_id: str) -> str:
    return BATCH_PREFIX + job_id.removeprefix("job_")


def job_of(batch_id: str) -> str:
    return "job_" + batch_id.removeprefix(BATCH_PREFIX)


def _job(session: Session, store_id: str, batch_id: str) -> Job:
    get(session, store_id)
    job = session.get(Job, job_of(batch_id)) if batch_id.startswith(BATCH_PREFIX) else None
    if job is None or job.spec.get("vector_store_id") != store_id:
        raise NotFound(f"No file batch {batch_id[:100]!r} in the vector store {store_id}.", param="batch_id")
    return job


def _batch_status(job: Job, counts: FileCounts) -> FileStatus:
    if counts.in_progress and job.state not in _OVER:
        return "in_progress"
    if job.state == "cancelled":
        return "cancelled"
    return "failed" if job.state == "failed" else "completed"


def shown(row: VectorStoreFile) -> StoreFileObject:
    error: dict[str, Any] | None = row.last_error
    return StoreFileObject(
        id=row.file_id,
        created_at=int(row.created_at.timestamp()),
        vector_store_id=row.vector_store_id,
        status=row.status,  # type: ignore[arg-type]  # the column holds nothing else
        usage_bytes=row.usage_bytes,
        last_error=LastError.model_validate(error) if error else None,
        attributes=row.attributes,
        chunking_strategy=StaticStrategyObject(static=row.chunking),
        parampara={"job_id": row.job_id},
    )
