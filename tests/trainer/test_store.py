"""Tokens on disk: larger than memory, made once, never used damaged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parampara.datasets import Document, Page, chunks
from parampara.schemas.stages import DaptConfig
from tests.trainer.runs import dapt_config
from trainer import blocks
from trainer.binning import best_fit
from trainer.engine import load_tokenizer
from trainer.store import StoredRows, open_store, parts_of, write_store

LARGE = """
import resource, sys
from pathlib import Path
from trainer.binning import best_fit
from trainer.store import StoredRows, write_store

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
document = list(range(1000))
store = write_store(Path(sys.argv[1]), "k", (("%064x" % number, [document]) for number in range(30_000)))
rows = StoredRows(store, best_fit(store.lengths.tolist(), 2048))
assert len(rows) == 15_000 and rows[14_999].input_ids == document * 2
assert sum(map(sum, rows.parts())) == 30_000_000
print(peak() - before)
"""


def test_thirty_million_tokens_take_little_memory(tmp_path: Path) -> None:
    """As lists of numbers they take 240 MB at the least; on disk they are 120."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "k" / "tokens.raw").stat().st_size == 120_000_000
    assert int(done.stdout) < 60


def test_rows_read_back_what_was_written(tmp_path: Path) -> None:
    documents = [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8, 2, 9], [7, 9]]
    store = write_store(tmp_path, "k", [("aa" * 32, documents[:3]), ("bb" * 32, documents[3:])])
    assert (store.hashes, store.chunk_of.tolist()) == (["aa" * 32, "bb" * 32], [0, 0, 0, 1])
    rows = StoredRows(store, best_fit(store.lengths.tolist(), 6))
    assert [row.input_ids for row in rows] == [[5, 6, 7, 8, 2, 9], [1, 2, 3, 9, 4, 9], [7, 9]]
    assert [row.parts for row in rows] == parts_of(rows) == [(6,), (4, 2), (2,)]
    assert [part.labels for row in rows for part in row.split()] == [documents[i] for i in (2, 0, 1, 3)]
    assert [row.trained for row in rows[:2]] == [5, 4]


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The books that were read."""
    read, original = [], blocks.read_book

    def counted(path: Path) -> Document:
        read.append(path)
        return original(path)

    monkeypatch.setattr(blocks, "read_book", counted)
    return read


def test_books_are_tokenized_once_per_what_the_tokens_depend_on(base: Path, book: Path, tmp_path: Path, readings: list[Path]) -> None:
    tokenizer, config = load_tokenizer(base), dapt_config(base, book)

    def build(config: DaptConfig, tokenizer: Any = tokenizer) -> str:
        return blocks.build_rows(config, tokenizer, workdir=tmp_path).sha256

    first = build(config)
    assert (build(config), len(readings)) == (first, 1)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(book.read_bytes())
    assert (build(dapt_config(base, moved, learning_rate=1e-4)), len(readings)) == (first, 1)
    assert build(dapt_config(base, book, max_seq_length=32)) != first
    moved.write_text(book.read_text() + "\n\nOne more sentence about Ketu.\n")
    assert build(dapt_config(base, moved)) != first
    assert len(readings) == 3
    assert len(list((tmp_path / "tokens" / "train").iterdir())) == 1  # the earlier ones are gone
    tokenizer.add_tokens(["Ketu"])
    assert build(dapt_config(base, moved)) != first
    assert len(readings) == 4


@pytest.mark.parametrize("name", ["tokens.raw", "documents.raw", "chunks.raw", "store.json"])
def test_a_damaged_store_is_noticed_and_made_again(base: Path, book: Path, tmp_path: Path, name: str, readings: list[Path]) -> None:
    tokenizer, config = load_tokenizer(base), dapt_config(base, book)
    first = blocks.build_rows(config, tokenizer, workdir=tmp_path).sha256
    (path,) = (tmp_path / "tokens" / "train").glob(f"*/{name}")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert blocks.build_rows(config, tokenizer, workdir=tmp_path).sha256 == first
    assert len(readings) == 2


def test_a_store_that_could_not_be_finished_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Any:
        yield "aa" * 32, [[1, 2]]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_store(tmp_path, "k", chunks())
    assert list(tmp_path.iterdir()) == []
    assert open_store(tmp_path, "k") is None


def test_a_long_document_is_chunked_in_stretches_and_ends_once(base: Path, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(base)
    text = book.read_text(encoding="utf-8").strip()
    monkeypatch.setattr(chunks, "_STRETCH", 700)
    document = Document("t", [Page("1", text), Page("2", text)])
    stretches = list(chunks._stretches(document))
    assert len(stretches) > 4
    assert all(sum(len(page.text) for page in stretch.pages) <= 700 for stretch in stretches)
    assert "".join(page.text for stretch in stretches for page in stretch.pages) == text * 2
    pieces = list(blocks._pieces(document, tokenizer, chunk_tokens=64))
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert "".join("".join(piece.text.split()) for piece in pieces) == "".join((text * 2).split())
