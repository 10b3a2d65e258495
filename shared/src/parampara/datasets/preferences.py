"""Preference rows: JSON lines that each hold a prompt with a better and a worse answer to it, read strictly.

Forms (``metadata`` is optional in each): ``{"input": {"messages": [...]}, "preferred_output": [...], "non_preferred_output": [...]}``
as OpenAI's preference fine-tuning has it, ``{"prompt": [...], "chosen": [...], "rejected": [...]}`` as TRL has it, with messages in each
list and one assistant's message in the answers, and ``{"question" or "prompt", "chosen", "rejected"}`` as plain texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parampara.datasets.rows import (
    MIN_ROWS,
    Message,
    RawRow,
    asked,
    checked_messages,
    checked_metadata,
    checked_text,
    read_rows,
    require_enough,
    said,
)
from parampara.datasets.split import content_hash
from parampara.errors import InvalidData

_WHAT = "preference"


@dataclass(frozen=True)
class PreferenceRow:
    """``prompt`` ends with the user's message; ``chosen`` is the better answer to it and ``rejected`` the worse one."""

    prompt: list[Message]
    chosen: str
    rejected: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def asked(self) -> str:
        """All that the user said: what a held-out split must not share with training, whatever the answers are."""
        return asked(self.prompt)

    @property
    def text(self) -> str:
        """All that was said but system prompts, with both answers."""
        return f"{said(self.prompt)}\nchosen: {self.chosen}\nrejected: {self.rejected}"


def read_preferences(path: Path, label: str | None = None) -> list[PreferenceRow]:
    """Read all rows of one file; ``label`` is its name in messages.

    Raises:
        InvalidData: names file, line and rule: not UTF-8, not JSON, wrong columns, wrong role, an empty prompt or answer, two equal
            answers, a row above ``MAX_ROW_BYTES``, an empty file.
    """
    return [_row(row) for row in read_rows(path, name=label or path.name, what=_WHAT)]


def validate_preferences(paths: Iterable[Path], labels: Iterable[str] | None = None, *, split: bool = False) -> int:
    """Check every row of every file without keeping them; return how many distinct rows there are.

    ``split``: some of these very questions are to be held out, for which one is not enough, however many pairs are about it.

    Raises:
        InvalidData: as :func:`read_preferences`; or all files together hold fewer than ``MIN_ROWS`` distinct rows, or questions.
    """
    files = list(paths)
    if not files:
        raise InvalidData("No preference file was given; at least one is needed.", param="preferences")
    distinct: set[str] = set()
    questions: set[str] = set()
    total = 0
    names = list(labels) if labels is not None else [path.name for path in files]
    for path, name in zip(files, names, strict=True):
        for row in read_rows(path, name=name, what=_WHAT):
            read = _row(row)
            distinct.add(content_hash(read.text))
            questions.add(content_hash(read.asked))
            total += 1
    require_enough(total, distinct=len(distinct), name=", ".join(names))
    if split and len(questions) < MIN_ROWS:
        raise InvalidData(
            f"{', '.join(names)}: all {total} pairs are about one question; bring pairs about another one, or validation files, "
            "for a question is either trained on or held out.",
            param=", ".join(names),
        )
    return len(distinct)


def _row(row: RawRow) -> PreferenceRow:
    metadata = checked_metadata(row)
    prompt, chosen, rejected = _parts(row)
    if chosen == rejected:
        raise row.fault("the better answer and the worse one are equal; there is nothing to prefer.")
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected, metadata=metadata)


def _parts(row: RawRow) -> tuple[list[Message], str, str]:
    """Prompt, better and worse answer, whichever form the row has."""
    data = row.data
    if {"input", "preferred_output", "non_preferred_output"} <= data.keys():
        given = data["input"]
        messages = given.get("messages") if isinstance(given, dict) else None
        prompt = _prompt(messages, row, column="input.messages")
        return prompt, _answer(row, "preferred_output"), _answer(row, "non_preferred_output")
    if {"chosen", "rejected"} <= data.keys() and ("prompt" in data) != ("question" in data):
        if isinstance(data.get("prompt"), list):
            return _prompt(data["prompt"], row, column="prompt"), _answer(row, "chosen"), _answer(row, "rejected")
        asks = "prompt" if "prompt" in data else "question"
        return [Message("user", _text(row, asks))], _text(row, "chosen"), _text(row, "rejected")
    raise row.fault(
        f'columns {sorted(data)[:8]} are none of the accepted forms: {{"input", "preferred_output", "non_preferred_output"}}, '
        '{"prompt", "chosen", "rejected"} or {"question", "chosen", "rejected"}.'
    )


def _prompt(value: Any, row: RawRow, *, column: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise row.fault(f"{column} is a list of messages that ends with the user's.")
    messages = checked_messages(value, row, column=column)
    if messages[-1].role != "user":
        raise row.fault(f"{column} ends with the {messages[-1].role}'s message; the user's must be last, for the answers come next.")
    if not messages[-1].content:
        raise row.fault(f"{column} ends with an empty message.")
    return messages


def _answer(row: RawRow, column: str) -> str:
    value = row.data[column]
    if not isinstance(value, list) or len(value) != 1:
        raise row.fault(f"{column} is a list of one assistant's message.")
    (message,) = checked_messages(value, row, column=column)
    if message.role != "assistant":
        raise row.fault(f"{column}[0].role is {message.role!r}; an answer is the assistant's.")
    if not message.content:
        raise row.fault(f"{column} is empty.")
    return message.content


def _text(row: RawRow, column: str) -> str:
    text = checked_text(row, column)
    if not text:
        raise row.fault(f"{column} is empty.")
    return text
