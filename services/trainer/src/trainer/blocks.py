"""Plain text to training rows: chunks, joined by end-of-text tokens and cut into blocks of equal length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parampara.datasets import Chunk, chunk_documents, hold_out, read_book
from parampara.errors import InvalidData
from parampara.schemas.stages import DaptConfig
from trainer.rows import StageData, TokenRow


def build_rows(config: DaptConfig, tokenizer: Any) -> StageData:
    """Read the books, cut them into chunks, hold some chunks out and pack the rest.

    Raises:
        InvalidData: a book can not be read, or there is too little text to train on and validate with.
    """
    params = config.params

    def chunks(paths: Sequence[Any]) -> list[Chunk]:
        documents = [read_book(path) for path in paths]
        return chunk_documents(documents, max_tokens=params.chunk_tokens, count_tokens=token_counter(tokenizer))

    train = chunks(config.data.train)
    if config.data.validation:
        held = chunks(config.data.validation)
    else:
        train, held = hold_out(
            train, fraction=params.validation_fraction, seed=config.seed, content=lambda chunk: chunk.text, what="chunks"
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


def _encode(chunks: list[Chunk], tokenizer: Any) -> list[list[int]]:
    """Token ids of each chunk: the tokenizer's own start token where it has one, the text, the end-of-text token."""
    if not chunks:
        return []
    encoded = tokenizer([chunk.text for chunk in chunks], add_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]
