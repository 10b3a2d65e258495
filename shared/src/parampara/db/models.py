"""Tables. Time is always the database's: every timestamp defaults to ``now()`` and leases compare against it.

Ids: ``run_``, ``job_``, ``att_``, ``evt_``..., OpenAI objects keep OpenAI's prefixes (``file-``, ``vs_``); artifacts are
``sha256:<hex>``, models ``ft:<base>:<org>:<suffix>:<id>``.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any

from pgvector.sqlalchemy import Vector
from sqlalchemy import BigInteger, Computed, DateTime, ForeignKey, Identity, Index, Integer, MetaData, Text, UniqueConstraint, func, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TSVECTOR
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

JOB_STATES = ("waiting", "queued", "running", "succeeded", "failed", "cancelled")
RUN_STATES = ("queued", "running", "succeeded", "failed", "cancelled")


def new_id(prefix: str) -> str:
    """A random id such as ``run_3f9c...`` (96 random bits)."""
    return prefix + secrets.token_hex(12)


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: DateTime(timezone=True), dict[str, Any]: JSONB(none_as_null=True), list[str]: ARRAY(Text), str: Text}


class ApiKey(Base):
    """``hash`` is HMAC-SHA256(pepper, whole key); the key itself is shown once and never stored."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    hint: Mapped[str]
    """First and last characters, to recognise a key in a list."""
    hash: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    """Any of ``admin``, ``jobs``, ``chat``; ``admin`` implies the rest."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[datetime | None]


class File(Base):
    """An uploaded file; its bytes lie at ``<files_dir>/<id>``."""

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]


class Run(Base):
    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    """The validated recipe with every default filled in."""
    datasets: Mapped[dict[str, Any]]
    """``{"books": [file ids], "books_validation": [...], "qa": [...], "qa_validation": [...], "preferences": [...],
    "preferences_validation": [...]}``; runs from before stage dpo lack the last two."""
    state: Mapped[str] = mapped_column(server_default="queued")
    gate: Mapped[str | None]
    """``promote``, ``hold`` or ``fail`` once evaluated."""
    model: Mapped[str | None]
    """Immutable name of the model that came out."""
    error: Mapped[dict[str, Any] | None]
    extra: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=text("'{}'"))
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    request_sha256: Mapped[str | None]
    """Hash of the request body: the same idempotency key with another body is refused."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Job(Base):
    """One stage of a run, and the queue itself: claimed, kept alive and finished by guarded UPDATEs on this row."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("run_id", "name", name="uq_jobs_run_id_name"),
        Index("ix_jobs_claimable", "queue", "state", "created_at"),
        Index("ix_jobs_cache_key", "cache_key"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    name: Mapped[str]
    """Stage name inside the run: ``dapt merge_dapt sft merge quantize evaluate deploy``, with ``merge_sft dpo`` before ``merge`` where the
    recipe has stage dpo."""
    kind: Mapped[str]
    queue: Mapped[str]
    position: Mapped[int] = mapped_column(Integer, server_default="0")
    state: Mapped[str] = mapped_column(server_default="queued")
    depends_on: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    """Ids of jobs that must have succeeded before this one may be queued."""
    spec: Mapped[dict[str, Any]]
    """Parameters and where each input comes from; see :mod:`parampara.plan`."""
    cache_key: Mapped[str | None]
    """Hash of kind, parameters, inputs' content and stage version: an equal key means an equal product."""
    fence: Mapped[int] = mapped_column(BigInteger, server_default="0")
    owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    crashes: Mapped[int] = mapped_column(Integer, server_default="0")
    cancel_requested: Mapped[bool] = mapped_column(server_default=text("false"))
    progress: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    """Newest of ``{"phase", "step", "total", "metrics": {...}, "eta_seconds"}``."""
    result: Mapped[dict[str, Any] | None]
    artifact_id: Mapped[str | None] = mapped_column(ForeignKey("artifacts.id"))
    reused_from: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Attempt(Base):
    """One try of a job. A retry adds a row and never overwrites the last one."""

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("job_id", "number", name="uq_attempts_job_id_number"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int] = mapped_column(Integer)
    fence: Mapped[int] = mapped_column(BigInteger)
    worker: Mapped[str]
    state: Mapped[str] = mapped_column(server_default="running")
    """``running succeeded failed crashed preempted cancelled lost``."""
    exit_code: Mapped[int | None] = mapped_column(Integer)
    error: Mapped[dict[str, Any] | None]
    log_tail: Mapped[str | None]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]


class Event(Base):
    """Append-only history of a run; ``id`` is the cursor of lists and of the SSE stream (``Last-Event-ID``).

    The order is (``xid``, ``id``): ids are handed out before COMMIT, so one may become visible after a higher one.
    """

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_run_id_xid_id", "run_id", "xid", "id"), Index("ix_events_job_id_xid_id", "job_id", "xid", "id"))
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    xid: Mapped[int] = mapped_column(BigInteger, server_default=text("(pg_current_xact_id()::text)::bigint"))
    """Number of the transaction that wrote it (64 bits, they never wrap around)."""
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int | None] = mapped_column(Integer)
    type: Mapped[str]
    """``message``, ``metrics`` or ``state``."""
    level: Mapped[str] = mapped_column(server_default="info")
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Outbox(Base):
    """Doorbells still to ring: written with the row they announce, sent after commit, again by the reconciler."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_unsent", "id", postgresql_where=text("sent_at IS NULL")),)
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    queue: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    sent_at: Mapped[datetime | None]


class Artifact(Base):
    __tablename__ = "artifacts"
    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    parents: Mapped[list[str]] = mapped_column(server_default=text("'{}'"))
    manifest: Mapped[dict[str, Any]]
    job_id: Mapped[str | None]
    """The job that made it first."""
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Model(Base):
    """An immutable model name and the artifact it stands for."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(primary_key=True)
    base_model: Mapped[str]
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"))
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="SET NULL"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Alias(Base):
    """A movable name. ``generation`` fences moves: only the deployment holding the newest one may flip it."""

    __tablename__ = "aliases"
    name: Mapped[str] = mapped_column(primary_key=True)
    generation: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Handed out by one, each time a deployment starts."""
    active_generation: Mapped[int] = mapped_column(BigInteger, server_default="0")
    model: Mapped[str | None] = mapped_column(ForeignKey("models.id"))
    url: Mapped[str | None]
    """Base URL of the model server that answers for it, without ``/v1``."""
    vector_store_id: Mapped[str | None] = mapped_column(ForeignKey("vector_stores.id", ondelete="SET NULL"))
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())


class Deployment(Base):
    """History of an alias: one row per try to serve an artifact under it."""

    __tablename__ = "deployments"
    id: Mapped[str] = mapped_column(primary_key=True)
    alias: Mapped[str] = mapped_column(ForeignKey("aliases.name"))
    model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    artifact_id: Mapped[str] = mapped_column(ForeignKey("artifacts.id"))
    generation: Mapped[int] = mapped_column(BigInteger)
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    status: Mapped[str] = mapped_column(server_default="pending")
    """``pending starting ready failed superseded``."""
    url: Mapped[str | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    ready_at: Mapped[datetime | None]


class VectorStore(Base):
    __tablename__ = "vector_stores"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(server_default="")
    embedding_model: Mapped[str]
    extra: Mapped[dict[str, Any]] = mapped_column("metadata", server_default=text("'{}'"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_active_at: Mapped[datetime] = mapped_column(server_default=func.now())
    deleted_at: Mapped[datetime | None]


class VectorStoreFile(Base):
    __tablename__ = "vector_store_files"
    vector_store_id: Mapped[str] = mapped_column(ForeignKey("vector_stores.id", ondelete="CASCADE"), primary_key=True)
    file_id: Mapped[str] = mapped_column(ForeignKey("files.id"), primary_key=True)
    status: Mapped[str] = mapped_column(server_default="in_progress")
    attributes: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"))
    chunking: Mapped[dict[str, Any]]
    usage_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0")
    last_error: Mapped[dict[str, Any] | None]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id", ondelete="SET NULL"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Chunk(Base):
    __tablename__ = "chunks"
    __table_args__ = (
        UniqueConstraint("vector_store_id", "file_id", "position", name="uq_chunks_place"),
        Index("ix_chunks_words", "words", postgresql_using="gin"),
    )
    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    vector_store_id: Mapped[str] = mapped_column(ForeignKey("vector_stores.id", ondelete="CASCADE"))
    file_id: Mapped[str]
    filename: Mapped[str]
    position: Mapped[int] = mapped_column(Integer)
    page: Mapped[str | None]
    text: Mapped[str]
    tokens: Mapped[int] = mapped_column(Integer)
    embedding: Mapped[Any] = mapped_column(Vector())
    words: Mapped[Any] = mapped_column(TSVECTOR, Computed("to_tsvector('simple'::regconfig, text)", persisted=True))
    """For the lexical half of retrieval; ``simple``, because English stemming mangles romanised Hindi."""
