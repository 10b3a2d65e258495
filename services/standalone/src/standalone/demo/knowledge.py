"""The books as a vector store, made with the official ``openai`` SDK."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import openai
from rich.console import Console

from parampara.errors import UpstreamFailed
from standalone.asking import openai_client
from standalone.client import Platform

NAME = "KP books"
CHUNK_TOKENS = 100
OVERLAP_TOKENS = 20
"""Small passages: three of them and a question have to fit the tiny model's window."""
_READY_SECONDS = 300.0


def knowledge_base(platform: Platform, file_ids: list[str], books: Sequence[Path], console: Console, *, fresh: bool) -> str:
    """The id of a completed vector store over ``file_ids``; one that an earlier demo made of the same books is taken again.

    Raises:
        UpstreamFailed: a file could not be taken in, or it took too long.
    """
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in books)).hexdigest()[:32]
    with openai_client(platform) as client:
        try:
            if not fresh and (known := _known(client, digest)):
                console.print(f"  knowledge base {known} of an earlier demo", highlight=False)
                return known
            store = client.vector_stores.create(
                name=NAME,
                file_ids=file_ids,
                metadata={"books": digest},
                chunking_strategy={
                    "type": "static",
                    "static": {"max_chunk_size_tokens": CHUNK_TOKENS, "chunk_overlap_tokens": OVERLAP_TOKENS},
                },
            )
            deadline = time.monotonic() + _READY_SECONDS
            while store.status == "in_progress" or store.file_counts.in_progress:
                if time.monotonic() > deadline:
                    raise UpstreamFailed(f"Vector store {store.id} was not ready after {_READY_SECONDS:.0f} s.", code="ingest_timeout")
                time.sleep(0.5)
                store = client.vector_stores.retrieve(store.id)
            if store.file_counts.failed or store.file_counts.completed != len(file_ids):
                raise UpstreamFailed(f"Vector store {store.id}: {_failures(client, store.id)}", code="ingest_failed")
        except openai.OpenAIError as error:
            raise UpstreamFailed(f"The books did not become a vector store: {error}", code="ingest_failed") from None
    console.print(f"  knowledge base {store.id}: {store.file_counts.completed} books", highlight=False)
    return store.id


def _known(client: openai.OpenAI, digest: str) -> str | None:
    for store in client.vector_stores.list(limit=100):
        if store.status == "completed" and (store.metadata or {}).get("books") == digest:
            return store.id
    return None


def _failures(client: openai.OpenAI, store_id: str) -> str:
    texts = []
    for file in client.vector_stores.files.list(store_id):
        if file.status != "completed":
            texts.append(f"{file.id} is {file.status}" + (f" ({file.last_error.message})" if file.last_error else ""))
    return "; ".join(texts) or "files are missing"
