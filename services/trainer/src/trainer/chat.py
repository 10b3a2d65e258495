"""Question-answer rows to training rows: the tokenizer's own chat template, a loss on the assistant's tokens only.

A conversation is rendered as the server will render it; :mod:`parampara.datasets.chat` says where prompt and answer part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parampara.datasets import QaRow, count_asked_in_both, count_duplicates, hold_out, read_qa
from parampara.datasets.chat import conversation_of, segments, token_ids
from parampara.datasets.qa import require_enough
from parampara.datasets.split import content_hash
from parampara.errors import InvalidData
from parampara.schemas.stages import SftConfig
from trainer.rows import IGNORED, StageData, TokenRow


def build_rows(config: SftConfig, tokenizer: Any) -> StageData:
    """Read, split and tokenize the rows, and check the mask of every one. All rows with one question are on one side of the split.

    Raises:
        InvalidData: a file is faulty, the tokenizer has no usable chat template, or a row would train nothing.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidData(f"{config.model.name}: the tokenizer has no chat template; supervised fine-tuning needs one.", param="model")
    params = config.params
    rows = _read(config.data.train)
    duplicates = count_duplicates([row for _, row in rows])
    if config.data.validation:
        train, held = rows, _read(config.data.validation)
    else:
        distinct = len({content_hash(row.text) for _, row in rows})
        require_enough(len(rows), distinct=distinct, name=", ".join(path.name for path in config.data.train))
        train, held = hold_out(rows, fraction=params.validation_fraction, seed=config.seed, content=lambda item: item[1].asked)
    cut: list[str] = []

    def tokenize(side: list[tuple[str, QaRow]]) -> list[TokenRow]:
        return [
            tokenize_row(row, tokenizer, system_prompt=params.system_prompt, max_length=params.train.max_seq_length, name=name, cut=cut)
            for name, row in side
        ]

    data = StageData(train=tokenize(train), validation=tokenize(held), facts={"duplicate_rows": duplicates})
    asked_in_both = count_asked_in_both([row for _, row in train], [row for _, row in held])
    data.facts.update(train_rows=len(train), validation_rows=len(held), truncated_rows=len(cut), asked_in_both=asked_in_both)
    return data


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


def _read(paths: Sequence[Path]) -> list[tuple[str, QaRow]]:
    return [(f"{path.name} row {number}", row) for path in paths for number, row in enumerate(read_qa(path), 1)]
