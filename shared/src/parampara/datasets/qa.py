"""Question-answer rows: JSON lines in one of three forms, read strictly into chat messages.

Forms (``metadata`` is optional in each): ``{"messages": [{"role", "content"}, ...]}`` as OpenAI fine-tuning has it,
``{"question", "answer"}``, and ``{"instruction", "input"?, "output"}``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parampara.datasets.rows import (
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

_WHAT = "question-answer"


@dataclass(frozen=True)
class QaRow:
    """``messages`` ends with the assistant's answer; ``metadata`` may hold kind, language, expected, topic."""

    messages: list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The last thing the user said."""
        return next(message.content for message in reversed(self.messages) if message.role == "user")

    @property
    def answer(self) -> str:
        return self.messages[-1].content

    @property
    def asked(self) -> str:
        """All that the user said: what a held-out split must not share with training, whatever was answered."""
        return asked(self.messages)

    @property
    def text(self) -> str:
        """All that was said but system prompts."""
        return said(self.messages)


def read_qa(path: Path, label: str | None = None) -> list[QaRow]:
    """Read all rows of one file; ``label`` is its name in messages.

    Raises:
        InvalidData: names file, line and rule: not UTF-8, not JSON, wrong columns, unknown role, no answer, a row above
            ``MAX_ROW_BYTES``, an empty file.
    """
    return [_row(row) for row in read_rows(path, name=label or path.name, what=_WHAT)]


def validate_qa(paths: Iterable[Path], labels: Iterable[str] | None = None) -> int:
    """Check every row of every file without keeping them; return how many distinct rows there are.

    Raises:
        InvalidData: as :func:`read_qa`; or all files together hold fewer than ``MIN_ROWS`` distinct rows.
    """
    files = list(paths)
    if not files:
        raise InvalidData("No question-answer file was given; at least one is needed.", param="qa")
    distinct: set[str] = set()
    total = 0
    names = list(labels) if labels is not None else [path.name for path in files]
    for path, name in zip(files, names, strict=True):
        for row in read_rows(path, name=name, what=_WHAT):
            distinct.add(content_hash(_row(row).text))
            total += 1
    require_enough(total, distinct=len(distinct), name=", ".join(names))
    return len(distinct)


def _row(row: RawRow) -> QaRow:
    metadata, data = checked_metadata(row), row.data
    if "messages" in data:
        messages = _messages(row)
    elif "question" in data and "answer" in data:
        messages = _pair(row, ("question",), "answer")
    elif "instruction" in data and "output" in data:
        messages = _pair(row, ("instruction", "input"), "output")
    else:
        raise row.fault(
            f'columns {sorted(data)[:8]} are none of the accepted forms: {{"messages"}}, {{"question", "answer"}} or '
            '{"instruction", "input"?, "output"}.'
        )
    return QaRow(messages=messages, metadata=metadata)


def _pair(row: RawRow, asks: tuple[str, ...], answers: str) -> list[Message]:
    texts = {column: checked_text(row, column) for column in (*asks, answers)}
    question = "\n\n".join(text for column in asks if (text := texts[column]))
    if not question:
        raise row.fault(f"{asks[0]} is empty.")
    if not texts[answers]:
        raise row.fault(f"{answers} is empty.")
    return [Message("user", question), Message("assistant", texts[answers])]


def _messages(row: RawRow) -> list[Message]:
    value = row.data["messages"]
    if not isinstance(value, list) or not value:
        raise row.fault("messages is a list of at least a user's and an assistant's message.")
    messages = checked_messages(value, row, column="messages")
    if messages[-1].role != "assistant":
        raise row.fault(f"the last message is the {messages[-1].role}'s; it must be the assistant's answer.")
    if not all(message.content for message in messages if message.role == "assistant"):
        raise row.fault("an assistant's message is empty; there is nothing to learn from it.")
    if not any(message.role == "user" for message in messages):
        raise row.fault("no message is the user's.")
    return messages
