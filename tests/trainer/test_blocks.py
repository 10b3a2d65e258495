"""Plain text to packed blocks: every token once, nothing padded, held-out chunks apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from parampara.errors import InvalidData
from parampara.progress import SilentProgress
from tests.trainer.runs import dapt_config, write_book
from trainer import dapt
from trainer.blocks import build_rows, pack, separate
from trainer.engine import load_tokenizer


def test_packing_keeps_every_token_in_order() -> None:
    documents = [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8, 9]]
    blocks = pack(documents, 4)
    assert [row.input_ids for row in blocks] == [[1, 2, 3, 9], [4, 9, 5, 6], [7, 8, 9]]
    assert all(row.labels == row.input_ids for row in blocks)
    assert [row.input_ids for row in separate(documents, 4)] == [[1, 2, 3, 9], [4, 9], [5, 6, 7, 8]]


def test_books_become_full_blocks_and_held_out_chunks(base: Path, book: Path) -> None:
    tokenizer = load_tokenizer(base)
    data = build_rows(dapt_config(base, book), tokenizer)
    assert all(len(row.input_ids) == 96 for row in data.train[:-1])
    text = tokenizer.decode([token for row in data.train for token in row.input_ids], skip_special_tokens=True)
    for row in data.validation:
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert row.input_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.input_ids, skip_special_tokens=True) not in text
    assert data.facts["train_chunks"] > data.facts["validation_chunks"] >= 1  # type: ignore[operator]


def test_too_little_text_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_book(tmp_path / "book.txt", paragraphs=1)
    path.write_text("One sentence.", encoding="utf-8")
    with pytest.raises(InvalidData, match="bring more data"):
        dapt.run(dapt_config(base, path), workdir=tmp_path / "work", progress=SilentProgress())


def test_a_directory_that_is_no_model_is_refused(book: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no config\.json"):
        dapt.run(dapt_config(tmp_path, book), workdir=tmp_path / "work", progress=SilentProgress())
