"""Plain text to training rows: chunks, an end-of-text token after each document's last, cut into blocks of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parampara.datasets import chunk_documents, hold_out, read_book
from parampara.errors import InvalidData
from parampara.schemas.stages import DaptConfig
from trainer.rows import StageData, TokenRow


def build_rows(config: DaptConfig, tokenizer: Any) -> StageData:
    """Read the books, cut them into chunks, hold some chunks out and pack the rest.

    Raises:
        InvalidData: a book can not be read, or there is too little text to train on and validate with.
    """
    params = config.params
    train = _pieces(config.data.train, tokenizer, chunk_tokens=params.chunk_tokens)
    if config.data.validation:
        held = _pieces(config.data.validation, tokenizer, chunk_tokens=params.chunk_tokens)
    else:
        train, held = hold_out(
            train, fraction=params.validation_fraction, seed=config.seed, content=lambda piece: piece.text, what="chunks"
        )
    rows = pack if params.train.packing else separate
    length = params.train.max_seq_length
    data = StageData(
        train=rows(_encode(train, tokenizer), length),
        validation=separate(_encode(held, tokenizer), length),
        facts={"books": len(config.data.train), "train_chunks": len(train), "validation_chunks": len(held)},
    )
    for side, name in ((data.train, "training"), (data.validation, "validation")):
        if not sum(row.trained for row in side):
            raise InvalidData(f"The books give no {name} tokens; bring more text.", param="data")
    return data


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def pack(documents: list[list[int]], length: int) -> list[TokenRow]:
    """One stream of all documents, cut every ``length`` tokens; only the last block is shorter, so nothing is padded or lost."""
    stream = [token for document in documents for token in document]
    blocks = [stream[start : start + length] for start in range(0, len(stream), length)]
    if len(blocks) > 1 and len(blocks[-1]) < 2:  # one token alone predicts nothing
        blocks.pop()
    return [TokenRow(input_ids=block, labels=block) for block in blocks]


def separate(documents: list[list[int]], length: int) -> list[TokenRow]:
    """One row per document, longer ones in several."""
    blocks = [document[start : start + length] for document in documents for start in range(0, len(document), length)]
    return [TokenRow(input_ids=block, labels=block) for block in blocks if len(block) > 1]


def end_of_text(tokenizer: Any) -> int | None:
    """The token that ends a document: Llama 3's own where the vocabulary has it (its chat models' EOS ends a turn), else the EOS."""
    return tokenizer.get_vocab().get("<|end_of_text|>", tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Piece:
    """A chunk; ``last`` if its document ends with it."""

    text: str
    last: bool


def _pieces(paths: Sequence[Path], tokenizer: Any, *, chunk_tokens: int) -> list[_Piece]:
    pieces: list[_Piece] = []
    for path in paths:
        chunks = chunk_documents([read_book(path)], max_tokens=chunk_tokens, count_tokens=token_counter(tokenizer))
        pieces += [_Piece(chunk.text, last=number == len(chunks)) for number, chunk in enumerate(chunks, 1)]
    return pieces


def _encode(pieces: list[_Piece], tokenizer: Any) -> list[list[int]]:
    """Token ids of each chunk: the tokenizer's own start token where it has one, the text, and where its document ends, the end.

    A chunk that ends in the middle of a document must not teach that the text is over.
    """
    if not pieces:
        return []
    encoded = tokenizer([piece.text for piece in pieces], add_special_tokens=True)["input_ids"]
    end = end_of_text(tokenizer)
    return [
        [*ids, end] if piece.last and end is not None and ids[-1:] != [end] else ids for piece, ids in zip(pieces, encoded, strict=True)
    ]
