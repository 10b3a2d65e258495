"""Stage ``ingest``: documents to chunks with embeddings.

Each document is finished for itself in ``workdir/parts``, so an attempt that goes on after a crash embeds only what is
missing. A document that can not be read is recorded and does not stop the others.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ingestor.embedding import BATCH, EmbeddingClient
from ingestor.tokens import estimate_tokens
from parampara.datasets.books import read_book
from parampara.datasets.chunks import Chunk, chunk_document
from parampara.errors import InvalidData, InvalidRequest, Preempted
from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.ingest import IngestConfig, IngestDocument, IngestResult
from parampara.storage import write_atomically


def run(config: IngestConfig, *, workdir: Path, progress: Progress) -> IngestResult:
    """Write ``workdir/output/chunks.jsonl``: one line per chunk with ``file_id filename position page text tokens embedding``.

    Raises:
        InvalidRequest: the overlap is not below the chunk size.
        InvalidData: no document at all could be read.
        Unavailable: the embedder does not answer.
        Preempted: asked to stop; finished documents are kept for the next attempt.
    """
    started = time.monotonic()
    if config.chunk_overlap_tokens > config.chunk_tokens // 2:
        raise InvalidRequest(
            f"chunk_overlap_tokens is {config.chunk_overlap_tokens}; at most half of chunk_tokens ({config.chunk_tokens}) may overlap.",
            param="chunk_overlap_tokens",
        )
    parts = workdir / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    done: dict[str, Path] = {}
    progress.phase("chunk and embed")
    with EmbeddingClient(config.embedder_url, config.embedding_model, on_wait=_refuse_if_stopped) as client:
        for number, document in enumerate(config.documents, 1):
            _refuse_if_stopped()
            try:
                done[document.file_id] = _ingest(document, config, client, parts)
            except InvalidData as error:
                failed[document.file_id] = error.message
                progress.event(f"{document.filename}: {error.message}", level="warn", file_id=document.file_id)
            progress.step(number, len(config.documents), failed=len(failed))
    if not done:
        raise InvalidData(_all_failed(config, failed), param="documents")
    progress.phase("write")
    output, chunks, tokens = _publish(list(done.values()), workdir)
    return IngestResult(
        output=output, documents=len(done), chunks=chunks, tokens=tokens, seconds=round(time.monotonic() - started, 3), failed=failed
    )


def _ingest(document: IngestDocument, config: IngestConfig, client: EmbeddingClient, parts: Path) -> Path:
    """The part file of one document, made unless an earlier attempt made the same one."""
    part = parts / f"{_part_name(document, config)}.jsonl"
    if part.exists():
        return part
    if not document.path.is_file():
        raise InvalidData(f"{document.filename}: its bytes are no longer stored; upload it again.", param=document.file_id)
    book = read_book(document.path, document.filename)
    chunks = chunk_document(book, max_tokens=config.chunk_tokens, count_tokens=estimate_tokens, overlap_tokens=config.chunk_overlap_tokens)
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in _rows(document, chunks, client))
    write_atomically(part, ("\n".join(lines) + "\n").encode())
    return part


def _rows(document: IngestDocument, chunks: list[Chunk], client: EmbeddingClient) -> Iterator[dict[str, Any]]:
    for start in range(0, len(chunks), BATCH):
        _refuse_if_stopped()
        batch = chunks[start : start + BATCH]
        for position, (chunk, vector) in enumerate(zip(batch, client.embed([chunk.text for chunk in batch]), strict=True), start):
            yield {
                "file_id": document.file_id,
                "filename": document.filename,
                "position": position,
                "page": chunk.page or None,
                "text": chunk.text,
                "tokens": chunk.tokens,
                "embedding": vector,
            }


def _publish(part_files: list[Path], workdir: Path) -> tuple[Path, int, int]:
    """Join the parts aside and rename them into ``workdir/output``; returns it with the numbers of chunks and tokens."""
    aside, output = workdir / "output.partial", workdir / "output"
    for directory in (aside, output):
        shutil.rmtree(directory, ignore_errors=True)
    aside.mkdir()
    chunks = tokens = 0
    with (aside / "chunks.jsonl").open("wb") as file:
        for part in part_files:
            for line in part.open("rb"):
                file.write(line)
                chunks += 1
                tokens += json.loads(line)["tokens"]
    aside.rename(output)
    return output, chunks, tokens


def _part_name(document: IngestDocument, config: IngestConfig) -> str:
    """Names what the part depends on: another chunking or model in the same workdir never reuses it."""
    settings = [document.file_id, document.filename, config.embedding_model, config.chunk_tokens, config.chunk_overlap_tokens]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _refuse_if_stopped() -> None:
    if stop.requested():
        raise Preempted("Asked to stop; the documents finished so far are kept.")


def _all_failed(config: IngestConfig, failed: dict[str, str]) -> str:
    shown = "; ".join(failed[document.file_id] for document in config.documents[:3])
    return f"None of the {len(failed)} documents could be read: {shown}"
