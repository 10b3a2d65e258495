"""Plain text to training rows: chunks, an end-of-text token after each document's last, packed into blocks whole and apart.

Books are read one after the other and their tokens written to a :mod:`trainer.store`; what stays in memory of a corpus are the
lengths of its chunks and the hashes by which some are held out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

from parampara.datasets import Document, iter_chunks, read_book
from parampara.datasets.split import content_hash, held_out
from parampara.errors import InvalidData
from parampara.progress import Progress, SilentProgress
from parampara.schemas.stages import DaptConfig
from trainer.binning import best_fit
from trainer.rows import StageData
from trainer.store import StoredRows, TokenStore, open_store, store_key, write_store

_TOGETHER = 256
"""Chunks in one call of the tokenizer."""
_TELL_SECONDS = 5.0


def build_rows(config: DaptConfig, tokenizer: Any, *, workdir: Path | None = None, progress: Progress | None = None) -> StageData:
    """Read the books, cut them into chunks, hold some chunks out and pack the rest into blocks of ``max_seq_length`` tokens.

    A block holds whole chunks that do not see each other, as best-fit-decreasing lays them (Ding et al. 2024, arXiv 2404.10830);
    only a chunk above ``max_seq_length`` is cut. The tokens are kept in ``workdir/"tokens"`` and found there by the next attempt.

    Raises:
        InvalidData: a book can not be read, or there is too little text to train on and validate with.
    """
    if workdir is None:
        with tempfile.TemporaryDirectory() as folder:  # files that are mapped live on until they are let go
            return build_rows(config, tokenizer, workdir=Path(folder), progress=progress)
    params, data = config.params, config.data
    root = workdir / "tokens"
    progress = progress or SilentProgress()
    store = _tokenized(data.train, tokenizer, config, root / "train", progress)
    if data.validation:
        held_store = _tokenized(data.validation, tokenizer, config, root / "validation", progress)
        train, held = list(range(len(store.lengths))), list(range(len(held_store.lengths)))
        chunks = (len(store.hashes), len(held_store.hashes))
    else:
        held_store, apart = store, held_out(store.hashes, fraction=params.validation_fraction, seed=config.seed, what="chunks")
        is_held = [digest in apart for digest in store.hashes]
        train = [number for number, chunk in enumerate(store.chunk_of) if not is_held[chunk]]
        held = [number for number, chunk in enumerate(store.chunk_of) if is_held[chunk]]
        chunks = (len(is_held) - sum(is_held), sum(is_held))
    for side, name in ((train, "training"), (held, "validation")):
        if not side:
            raise InvalidData(f"The books give no {name} tokens; bring more text.", param="data")
    if params.train.packing:
        blocks = best_fit([int(store.lengths[number]) for number in train], params.train.max_seq_length)
        rows = [[train[i] for i in block] for block in blocks]
    else:
        rows = [[number] for number in train]
    return StageData(
        train=StoredRows(store, rows),
        validation=StoredRows(held_store, [[number] for number in held]),
        facts={"books": len(data.train), "train_chunks": chunks[0], "validation_chunks": chunks[1]},
    )


def token_counter(tokenizer: Any) -> Callable[[str], int]:
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def end_of_text(tokenizer: Any) -> int | None:
    """The token that ends a document: Llama 3's own where the vocabulary has it (its chat models' EOS ends a turn), else the EOS."""
    return tokenizer.get_vocab().get("<|end_of_text|>", tokenizer.eos_token_id)


@dataclass(frozen=True)
class _Piece:
    """A chunk; ``last`` if its document ends with it."""

    text: str
    last: bool


def _tokenized(paths: Sequence[Path], tokenizer: Any, config: DaptConfig, root: Path, progress: Progress) -> TokenStore:
    facts = {
        "chunk_tokens": config.params.chunk_tokens,
        "max_seq_length": config.params.train.max_seq_length,
        "formats": [path.suffix.lower() for path in paths],
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items()),
        "end": end_of_text(tokenizer),
        "versions": [metadata.version(name) for name in ("transformers", "tokenizers")],
    }
    key = store_key(facts, paths)
    return open_store(root, key) or write_store(root, key, _encoded(paths, tokenizer, config, progress))


def _encoded(paths: Sequence[Path], tokenizer: Any, config: DaptConfig, progress: Progress) -> Iterator[tuple[str, list[list[int]]]]:
    """Hash and tokens of each chunk, in several documents where it is longer than a row."""
    length = config.params.train.max_seq_length
    done, said = 0, time.monotonic()
    for book, path in enumerate(paths, 1):
        rest = _pieces(read_book(path), tokenizer, chunk_tokens=config.params.chunk_tokens)
        while pieces := list(islice(rest, _TOGETHER)):
            done += len(pieces)
            if time.monotonic() - said > _TELL_SECONDS:  # a stage that says nothing for long is taken for stuck
                said = time.monotonic()
                progress.phase(f"tokenize: book {book} of {len(paths)}, {done:,} chunks")
            for piece, ids in zip(pieces, _encode(pieces, tokenizer), strict=True):
                yield content_hash(piece.text), _parts(ids, length)


def _parts(ids: list[int], length: int) -> list[list[int]]:
    """``ids`` in parts of at most ``length`` tokens, none of a single one: alone it predicts nothing and would not be learnt."""
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [parts[-2][:-1], parts[-2][-1:] + parts[-1]]
    return [part for part in parts if len(part) > 1]


def _pieces(document: Document, tokenizer: Any, *, chunk_tokens: int) -> Iterator[_Piece]:
    before = None
    for chunk in iter_chunks(document, max_tokens=chunk_tokens, count_tokens=token_counter(tokenizer)):
        if before is not None:
            yield _Piece(before, last=False)
        before = chunk.text
    if before is not None:
        yield _Piece(before, last=True)


def _encode(pieces: Sequence[_Piece], tokenizer: Any) -> list[list[int]]:
    """Token ids of each chunk: the tokenizer's own start token where it has one, the text, and where its document ends, the end.

    A chunk that ends in the middle of a document must not teach that the text is over.
    """
    encoded = tokenizer([piece.text for piece in pieces], add_special_tokens=True)["input_ids"]
    end = end_of_text(tokenizer)
    return [
        [*ids, end] if piece.last and end is not None and ids[-1:] != [end] else ids for piece, ids in zip(pieces, encoded, strict=True)
    ]
