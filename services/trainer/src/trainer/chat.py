"""Question-answer rows to training rows: the tokenizer's own chat template, a loss on the assistant's tokens only.

A conversation is rendered as the server will render it; :mod:`parampara.datasets.chat` says where prompt and answer part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from parampara.datasets import QaRow, count_asked_in_both, count_duplicates, hold_out, read_qa
from parampara.datasets.chat import conversation_of, segments, token_ids
from parampara.datasets.qa import require_enough
from parampara.datasets.split import content_hash
from parampara.errors import InvalidData
from parampara.schemas.stages import DpoConfig, SftConfig
from trainer.rows import IGNORED, StageData, TokenRow


def build_rows(config: SftConfig, tokenizer: Any) -> StageData:
    """Read, split and tokenize the rows, and check the mask of every one. All rows with one question are on one side of the split.

    Raises:
        InvalidData: a file is faulty, the tokenizer has no usable chat template, or a row would train nothing.
    """
    return rows_of(config, tokenizer, read=read_qa, tokenize=tokenize_row)


def rows_of(
    config: SftConfig | DpoConfig, tokenizer: Any, *, read: Callable[[Path], list[Any]], tokenize: Callable[..., TokenRow]
) -> StageData:
    """The rows of a stage that learns from conversations: ``read`` one file, ``tokenize`` one row as :func:`tokenize_row` does.

    Raises:
        InvalidData: as ``read`` and ``tokenize``, there is too little to hold anything out of, or there is no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidData(f"{config.model.name}: the tokenizer has no chat template; stage {config.kind} needs one.", param="model")
    params, files = config.params, config.data.train
    rows = _named(files, read)
    if config.data.validation:
        train, held = rows, _named(config.data.validation, read)
    else:
        distinct = len({content_hash(row.text) for _, row in rows})
        require_enough(len(rows), distinct=distinct, name=", ".join(path.name for path in files))
        train, held = hold_out(rows, fraction=params.validation_fraction, seed=config.seed, content=lambda item: item[1].asked)
    cut: list[str] = []
    tokens = partial(tokenize, tokenizer=tokenizer, system_prompt=params.system_prompt, max_length=params.train.max_seq_length, cut=cut)
    sides = [[tokens(row, name=name) for name, row in side] for side in (train, held)]
    facts: dict[str, int | float | str] = {
        "duplicate_rows": count_duplicates([row for _, row in rows]),
        "train_rows": len(train),
        "validation_rows": len(held),
        "truncated_rows": len(cut),
        "asked_in_both": count_asked_in_both([row for _, row in train], [row for _, row in held]),
    }
    return StageData(train=sides[0], validation=sides[1], facts=facts)


def tokenize_row(
    row: QaRow, tokenizer: Any, *, system_prompt: str | None, max_length: int, name: str = "row", cut: list[str] | None = None
) -> TokenRow:
    """Token ids of one conversation, cut at ``max_length``, with labels on the assistant's tokens.

    ``name`` says which row in messages; names of rows that had to be cut are added to ``cut``.

    Raises:
        InvalidData: nothing of an answer is left below ``max_length``, or the template does not render turn by turn.
    """
    ids: list[int] = []
    labels: list[int] = []
    for text, learnt in segments(tokenizer, conversation_of(row, system_prompt=system_prompt), name=name):
        tokens = token_ids(tokenizer, text)
        ids += tokens
        labels += tokens if learnt else [IGNORED] * len(tokens)
    result = TokenRow(input_ids=ids[:max_length], labels=labels[:max_length])
    if result.trained == 0:
        raise InvalidData(
            f"{name}: {len(ids)} tokens, of which the first {max_length} (max_seq_length) hold nothing of the answer: the row would "
            "train nothing. Shorten the question or raise max_seq_length.",
            param="params.train.max_seq_length",
        )
    if len(ids) > max_length and cut is not None:
        cut.append(name)
    return result


def _named(paths: Sequence[Path], read: Callable[[Path], list[Any]]) -> list[tuple[str, Any]]:
    return [(f"{path.name} row {number}", row) for path in paths for number, row in enumerate(read(path), 1)]
