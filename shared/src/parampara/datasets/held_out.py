"""Which texts and rows a model is measured on: validation files, or the part of the training files that the split holds out.

Chosen by content under the seed, so a file's order does not matter, a rerun measures the same items, and the stages that measure
(quantize, evaluate) take the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from parampara.datasets.books import read_book
from parampara.datasets.chunks import CountTokens, chunk_documents
from parampara.datasets.preferences import PreferenceRow, read_preferences
from parampara.datasets.qa import QaRow, read_qa
from parampara.datasets.split import content_hash, hold_out
from parampara.schemas.stages import DaptParams, DpoParams, PreferenceData, QaData, SftParams, TextData

Item = TypeVar("Item")


def held_out_texts(data: TextData, params: DaptParams, *, limit: int, seed: int, count_tokens: CountTokens) -> list[str]:
    """At most ``limit`` chunks that DAPT does not train on.

    Raises:
        InvalidData: a file is missing or not what it has to be, or nothing is held out.
    """
    documents = [read_book(path) for path in data.validation or data.train]
    chunks = chunk_documents(documents, max_tokens=params.chunk_tokens, count_tokens=count_tokens)
    if not data.validation:
        _, chunks = hold_out(chunks, fraction=params.validation_fraction, seed=seed, content=lambda chunk: chunk.text, what="chunks")
    return first_by_content([chunk.text for chunk in chunks], content=str, limit=limit, seed=seed)


def held_out_rows(data: QaData, params: SftParams, *, limit: int, seed: int) -> list[QaRow]:
    """At most ``limit`` question-answer rows that SFT does not train on.

    Raises:
        InvalidData: a file is missing or not what it has to be, or nothing is held out.
    """
    rows = [row for path in data.validation or data.train for row in read_qa(path)]
    if not data.validation:
        _, rows = hold_out(rows, fraction=params.validation_fraction, seed=seed, content=lambda row: row.asked)
    return first_by_content(rows, content=lambda row: row.text, limit=limit, seed=seed)


def trained_rows(data: QaData, params: SftParams, *, limit: int, seed: int) -> list[QaRow]:
    """At most ``limit`` rows that SFT trains on: none of those that :func:`held_out_rows` takes out of the same files.

    Raises:
        InvalidData: a file is missing or not what it has to be.
    """
    rows = [row for path in data.train for row in read_qa(path)]
    if not data.validation:
        rows, _ = hold_out(rows, fraction=params.validation_fraction, seed=seed, content=lambda row: row.asked)
    return first_by_content(rows, content=lambda row: row.text, limit=limit, seed=seed)


def trained_pairs(data: PreferenceData, params: DpoParams, *, seed: int) -> list[PreferenceRow]:
    """The pairs that DPO trains on.

    Raises:
        InvalidData: a file is missing or not what it has to be.
    """
    rows = [row for path in data.train for row in read_preferences(path)]
    if not data.validation:
        rows, _ = hold_out(rows, fraction=params.validation_fraction, seed=seed, content=lambda row: row.asked, what="pairs")
    return rows


def first_by_content(items: Sequence[Item], *, content: Callable[[Item], str], limit: int, seed: int) -> list[Item]:
    """The distinct items whose seeded content hashes come first."""
    by_hash = {content_hash(content(item)): item for item in items}
    order = sorted(by_hash, key=lambda digest: hashlib.sha256(f"evaluate:{seed}:{digest}".encode()).digest())
    return [by_hash[digest] for digest in order[:limit]]
