"""What goes into stage ingest and what comes out of it; conventions as in :mod:`parampara.schemas.stages`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from parampara.schemas.stages import Strict


class IngestDocument(Strict):
    file_id: str
    filename: str
    path: Path


class IngestConfig(Strict):
    kind: Literal["ingest"] = "ingest"
    vector_store_id: str
    documents: Annotated[list[IngestDocument], Field(min_length=1)]
    embedder_url: str
    embedding_model: str
    chunk_tokens: Annotated[int, Field(ge=100, le=4096)] = 800
    chunk_overlap_tokens: Annotated[int, Field(ge=0)] = 400


class IngestResult(Strict):
    """``output`` holds chunks.jsonl (file_id, position, text, page, embedding), which the worker writes to pgvector."""

    output: Path
    documents: int
    chunks: int
    tokens: int
    seconds: float
    failed: dict[str, str] = {}
    """file id to the reason why it has no chunks."""
