"""Plain text to packed blocks: every token once, documents whole and apart, held-out chunks apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from parampara.errors import InvalidData
from parampara.progress import SilentProgress
from parampara.schemas.stages import TextData
from tests.trainer.runs import dapt_config, write_book
from trainer import dapt
from trainer.blocks import _parts, build_rows, end_of_text
from trainer.engine import load_tokenizer


def test_books_become_full_blocks_and_held_out_chunks(base: Path, book: Path) -> None:
    tokenizer = load_tokenizer(base)
    config = dapt_config(base, book, max_seq_length=512)
    data = build_rows(config, tokenizer)
    assert all(512 >= len(row.input_ids) > 512 - 64 for row in data.train[:-1])
    text = tokenizer.decode([token for row in data.train for token in row.input_ids], skip_special_tokens=True)
    for row in data.validation:
        assert row.input_ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(row.input_ids, skip_special_tokens=True) not in text
    assert data.facts["train_chunks"] > data.facts["validation_chunks"] >= 1  # type: ignore[operator]


def test_only_the_end_of_a_document_is_taught_as_the_end_of_text(tmp_path: Path) -> None:
    """Llama 3's chat models end a turn with their EOS; text ends with another token, and a chunk ends with none."""
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "examples" / "kp" / "base")
    books = [write_book(tmp_path / f"{seed}.txt", seed=seed) for seed in range(2)]
    config = dapt_config(tmp_path, books[0])
    config = config.model_copy(update={"data": TextData(train=books, validation=[books[0]])})
    data = build_rows(config, tokenizer)
    end, turn = (tokenizer.get_vocab()[token] for token in ("<|end_of_text|>", "<|eot_id|>"))
    stream = [token for row in data.train for token in row.input_ids]
    assert data.facts["train_chunks"] > 10  # type: ignore[operator]
    assert (stream.count(end), stream.count(turn)) == (2, 0)
    assert sum(part.input_ids[-1] == end for row in data.train for part in row.split()) == 2
    assert stream.count(tokenizer.bos_token_id) == data.facts["train_chunks"]
    assert [row.input_ids[-1] == end for row in data.validation] == [False] * (len(data.validation) - 1) + [True]


def test_a_vocabulary_without_end_of_text_ends_with_its_eos(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    assert end_of_text(tokenizer) == tokenizer.eos_token_id


def test_too_little_text_is_refused(base: Path, tmp_path: Path) -> None:
    path = write_book(tmp_path / "book.txt", paragraphs=1)
    path.write_text("One sentence.", encoding="utf-8")
    with pytest.raises(InvalidData, match="bring more data"):
        dapt.run(dapt_config(base, path), workdir=tmp_path / "work", progress=SilentProgress())


def test_a_directory_that_is_no_model_is_refused(book: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"no config\.json"):
        dapt.run(dapt_config(tmp_path, book), workdir=tmp_path / "work", progress=SilentProgress())


def test_no_token_is_lost_where_a_chunk_is_one_longer_than_a_row() -> None:
    assert _parts(list(range(9)), 4) == [[0, 1, 2, 3], [4, 5, 6], [7, 8]]
    assert _parts(list(range(8)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert _parts([1], 4) == []


def test_rows_are_known_by_their_books_and_order_without_being_read(base: Path, book: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(base)
    config = dapt_config(base, book)
    known = build_rows(config, tokenizer).sha256
    moved = tmp_path / "moved.txt"
    moved.write_bytes(book.read_bytes())
    assert build_rows(dapt_config(base, moved), tokenizer).sha256 == known
    moved.write_bytes(book.read_bytes() + b"One more line of text.\n")
    assert build_rows(dapt_config(base, moved), tokenizer).sha256 != known
    assert build_rows(config.model_copy(update={"seed": config.seed + 1}), tokenizer).sha256 != known
