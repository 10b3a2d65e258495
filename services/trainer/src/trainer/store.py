"""Token ids of a whole corpus in one file, mapped into memory: what is larger than memory can be trained on.

A store is a directory: ``tokens.raw`` (int32, all documents end to end), ``documents.raw`` (int64 pairs: tokens of a document, number
of the chunk it is from), ``chunks.raw`` (32 bytes each: hash of a chunk's text) and ``store.json``. It is written aside and renamed
into place, under a name that says what it was made from, so that a resumed attempt reads it instead of tokenizing again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, overload

import numpy

from parampara.manifest import sha256_file
from parampara.storage import fsync_directory, fsync_tree
from trainer.rows import TokenRow

_FILES = ("tokens.raw", "documents.raw", "chunks.raw")


class TokenStore:
    """Opens what :func:`write_store` wrote. ``lengths[i]`` and ``chunk_of[i]`` describe document ``i``; ``hashes[c]`` chunk ``c``."""

    def __init__(self, directory: Path) -> None:
        self.key = directory.name
        pairs = numpy.fromfile(directory / "documents.raw", dtype=numpy.int64).reshape(-1, 2)
        self.lengths, self.chunk_of = pairs[:, 0], pairs[:, 1]
        self._starts = numpy.concatenate([[0], self.lengths.cumsum()])
        self._tokens = numpy.memmap(directory / "tokens.raw", dtype=numpy.int32, mode="r") if len(pairs) else numpy.empty(0, numpy.int32)
        digests = (directory / "chunks.raw").read_bytes()
        self.hashes = [digests[at : at + 32].hex() for at in range(0, len(digests), 32)]

    def document(self, number: int) -> list[int]:
        return self._tokens[self._starts[number] : self._starts[number + 1]].tolist()


class StoredRows(Sequence[TokenRow]):
    """Rows of documents of a store, read when asked for; every token of them is learnt."""

    def __init__(self, store: TokenStore, rows: Sequence[Sequence[int]]) -> None:
        self._store, self._rows = store, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...
    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...
    def __getitem__(self, index: int | slice) -> TokenRow | StoredRows:
        if isinstance(index, slice):
            return StoredRows(self._store, self._rows[index])
        documents = [self._store.document(number) for number in self._rows[index]]
        tokens = [token for document in documents for token in document]
        return TokenRow(tokens, tokens, parts=tuple(map(len, documents)))

    def sha256(self) -> str:
        """Of the rows, by the key of the store and the documents of each: the tokens of a large corpus are not read for it."""
        digest = hashlib.sha256(self._store.key.encode())
        for row in self._rows:
            digest.update(array("q", [len(row), *row]).tobytes())
        return digest.hexdigest()

    def parts(self) -> list[tuple[int, ...]]:
        """As :func:`parts_of`."""
        return [tuple(int(self._store.lengths[number]) for number in row) for row in self._rows]


def parts_of(rows: Sequence[TokenRow]) -> list[tuple[int, ...]]:
    """Lengths of the documents of each row, without reading what lies on disk."""
    return rows.parts() if isinstance(rows, StoredRows) else [row.parts for row in rows]


def open_store(root: Path, key: str) -> TokenStore | None:
    """The store of ``key`` below ``root`` if it is there and whole, bit by bit; a damaged one is deleted."""
    directory = root / key
    try:
        listed = json.loads((directory / "store.json").read_text(encoding="utf-8"))["sha256"]
        if all(sha256_file(directory / name) == listed[name] for name in _FILES):
            return TokenStore(directory)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    shutil.rmtree(directory, ignore_errors=True)
    return None


def write_store(root: Path, key: str, chunks: Iterable[tuple[str, list[list[int]]]]) -> TokenStore:
    """Write ``(hash of the text, documents)`` of each chunk as they come and open the result; other stores below ``root`` go.

    Raises:
        Whatever ``chunks`` raises, and OSError when the disk is full; nothing is left then.
    """
    root.mkdir(parents=True, exist_ok=True)
    for other in root.iterdir():  # of other data, or of a process that died while it wrote
        shutil.rmtree(other, ignore_errors=True)
    stage = root / f".stage-{uuid.uuid4().hex}"
    stage.mkdir()
    try:
        with ExitStack() as stack:
            tokens, described, hashes = (stack.enter_context((stage / name).open("wb")) for name in _FILES)
            for number, (digest, documents) in enumerate(chunks):
                hashes.write(bytes.fromhex(digest))
                for document in documents:
                    tokens.write(numpy.asarray(document, dtype=numpy.int32).tobytes())
                    described.write(numpy.asarray([len(document), number], dtype=numpy.int64).tobytes())
        (stage / "store.json").write_text(json.dumps({"sha256": {name: sha256_file(stage / name) for name in _FILES}}), encoding="utf-8")
        fsync_tree(stage)
        os.rename(stage, root / key)
        fsync_directory(root)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return TokenStore(root / key)


def store_key(facts: dict[str, Any], files: Iterable[Path]) -> str:
    """Hash of everything that the tokens depend on: the settings in ``facts`` and the bytes of ``files`` in order."""
    described = {**facts, "format": 1, "files": [sha256_file(path) for path in files]}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
