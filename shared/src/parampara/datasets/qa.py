"""Question-answer rows: JSON lines in one of three forms, read strictly into chat messages.

Forms (``metadata`` is optional in each): ``{"messages": [{"role", "content"}, ...]}`` as OpenAI fine-tuning has it,
``{"question", "answer"}``, and ``{"instruction", "input"?, "output"}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from parampara.datasets.split import content_hash
from parampara.datasets.text import checked_size, clean_text, decode_utf8
from parampara.errors import InvalidData

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")
MAX_ROW_BYTES = 1024 * 1024
MAX_QA_BYTES = 8 * 1024**3
MAX_MESSAGES = 256
MIN_ROWS = 2
"""Training and validation need one row each."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


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
        return "\n".join(message.content for message in self.messages if message.role == "user")

    @property
    def text(self) -> str:
        """All that was said but system prompts."""
        return "\n".join(f"{message.role}: {message.content}" for message in self.messages if message.role != "system")


def read_qa(path: Path, label: str | None = None) -> list[QaRow]:
    """Read all rows of one file; ``label`` is its name in messages.

    Raises:
        InvalidData: names file, line and rule: not UTF-8, not JSON, wrong columns, unknown role, no answer, a row above
            ``MAX_ROW_BYTES``, an empty file.
    """
    name = label or path.name
    checked_size(path, name=name, limit=MAX_QA_BYTES)
    rows = [_row(line, name=name, number=number) for number, line in _lines(path, name)]
    if not rows:
        raise InvalidData(f"{name}: the file holds no row.", param=name)
    return rows


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
        checked_size(path, name=name, limit=MAX_QA_BYTES)
        before = total
        for number, line in _lines(path, name):
            distinct.add(content_hash(_row(line, name=name, number=number).text))
            total += 1
        if total == before:
            raise InvalidData(f"{name}: the file holds no row.", param=name)
    require_enough(total, distinct=len(distinct), name=", ".join(names))
    return len(distinct)


def require_enough(total: int, *, distinct: int, name: str) -> None:
    """Refuse a set too small to hold anything out of.

    Raises:
        InvalidData: fewer than ``MIN_ROWS`` distinct rows.
    """
    if distinct < MIN_ROWS:
        raise InvalidData(
            f"{name}: {total} row(s), {distinct} distinct; at least {MIN_ROWS} distinct rows are needed, to train and to validate.",
            param=name,
        )


def count_duplicates(rows: Iterable[QaRow]) -> int:
    """How many rows repeat the questions and answers of an earlier one."""
    seen = [content_hash(row.text) for row in rows]
    return len(seen) - len(set(seen))


def count_asked_in_both(trained: Iterable[QaRow], held_out: Iterable[QaRow]) -> int:
    """How many held-out rows ask the same as a training row."""
    seen = {content_hash(row.asked) for row in trained}
    return sum(content_hash(row.asked) in seen for row in held_out)


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise InvalidData(f"{name} line {number}: the row is longer than {MAX_ROW_BYTES} bytes; shorten it.", param=name)
            if line.strip():
                yield number, line


def _row(line: bytes, *, name: str, number: int) -> QaRow:
    where = f"{name} line {number}"
    text = decode_utf8(line, name=where)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError: an integer of more digits than Python converts
        raise InvalidData(
            f"{where}: not JSON ({error}); a question-answer file has one JSON object per line (JSONL).", param=name
        ) from None
    if not isinstance(data, dict):
        raise InvalidData(f"{where}: a row is a JSON object, not {type(data).__name__}.", param=name)
    metadata = data.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise InvalidData(f"{where}: metadata is an object, not {type(metadata).__name__}.", param=name)
    if "messages" in data:
        messages = _messages(data["messages"], where=where, name=name)
    elif "question" in data and "answer" in data:
        messages = _pair(data, ("question",), "answer", where=where, name=name)
    elif "instruction" in data and "output" in data:
        messages = _pair(data, ("instruction", "input"), "output", where=where, name=name)
    else:
        raise InvalidData(
            f'{where}: columns {sorted(data)[:8]} are none of the accepted forms: {{"messages"}}, {{"question", "answer"}} or '
            '{"instruction", "input"?, "output"}.',
            param=name,
        )
    cleaned = {key: clean_text(value) if isinstance(value, str) else value for key, value in metadata.items()}
    return QaRow(messages=messages, metadata=cleaned)


def _pair(data: dict[str, Any], asks: tuple[str, ...], answers: str, *, where: str, name: str) -> list[Message]:
    for column in (*asks, answers):
        if data.get(column) is not None and not isinstance(data[column], str):
            raise InvalidData(f"{where}: {column} is text, not {type(data[column]).__name__}.", param=name)
    question = "\n\n".join(text for column in asks if (text := clean_text(data.get(column) or "").strip()))
    answer = clean_text(data.get(answers) or "").strip()
    if not question:
        raise InvalidData(f"{where}: {asks[0]} is empty.", param=name)
    if not answer:
        raise InvalidData(f"{where}: {answers} is empty.", param=name)
    return [Message("user", question), Message("assistant", answer)]


def _messages(value: Any, *, where: str, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InvalidData(f"{where}: messages is a list of at least a user's and an assistant's message.", param=name)
    if len(value) > MAX_MESSAGES:
        raise InvalidData(f"{where}: {len(value)} messages, above the limit of {MAX_MESSAGES}.", param=name)
    messages: list[Message] = []
    for position, item in enumerate(value):
        at = f"{where}: messages[{position}]"
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise InvalidData(f'{at} is {{"role": ..., "content": "text"}}.', param=name)
        if item.get("role") not in ROLES:
            raise InvalidData(f"{at}.role is {str(item.get('role'))[:40]!r}; use one of {', '.join(ROLES)}.", param=name)
        if item["role"] == "system" and position > 0:
            raise InvalidData(f"{at}.role is 'system'; only the first message may be.", param=name)
        messages.append(Message(cast(Role, item["role"]), clean_text(item["content"]).strip()))
    if messages[-1].role != "assistant":
        raise InvalidData(f"{where}: the last message is the {messages[-1].role}'s; it must be the assistant's answer.", param=name)
    if not all(message.content for message in messages if message.role == "assistant"):
        raise InvalidData(f"{where}: an assistant's message is empty; there is nothing to learn from it.", param=name)
    if not any(message.role == "user" for message in messages):
        raise InvalidData(f"{where}: no message is the user's.", param=name)
    return messages
