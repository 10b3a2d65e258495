"""What rows of conversations share, whatever they are for: JSON lines read one by one, messages checked and cleaned.

Every fault is an ``InvalidData`` that names file, line and rule. :mod:`.qa` and :mod:`.preferences` say which columns a row has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from parampara.datasets.split import content_hash
from parampara.datasets.text import checked_size, clean_text, decode_utf8
from parampara.errors import InvalidData

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")
MAX_ROW_BYTES = 1024 * 1024
MAX_FILE_BYTES = 8 * 1024**3
MAX_MESSAGES = 256
MIN_ROWS = 2
"""Training and validation need one row each."""


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


class Row(Protocol):
    """What rows of every kind have."""

    @property
    def asked(self) -> str:
        """All that the user said."""
        ...

    @property
    def text(self) -> str:
        """All that was said but system prompts."""
        ...


@dataclass(frozen=True)
class RawRow:
    """A JSON object as it lies in a file; ``where`` is its place in messages, ``name`` that of its file."""

    data: dict[str, Any]
    where: str
    name: str

    def fault(self, rule: str) -> InvalidData:
        """The error for a row that breaks ``rule``."""
        return InvalidData(f"{self.where}: {rule}", param=self.name)


def read_rows(path: Path, *, name: str, what: str) -> Iterator[RawRow]:
    """The rows of one file in order; ``what`` says in messages what kind of file it is.

    Raises:
        InvalidData: not UTF-8, not JSON, no object, a row above ``MAX_ROW_BYTES``, an empty file.
    """
    checked_size(path, name=name, limit=MAX_FILE_BYTES)
    empty = True
    for number, line in _lines(path, name):
        yield _object(line, where=f"{name} line {number}", name=name, what=what)
        empty = False
    if empty:
        raise InvalidData(f"{name}: the file holds no row.", param=name)


def checked_messages(value: Any, row: RawRow, *, column: str) -> list[Message]:
    """The list of ``{"role", "content"}`` that ``column`` of the row holds, cleaned; at most the first is a system message.

    Raises:
        InvalidData: too many, not of that form, an unknown role, or a system message further on.
    """
    if len(value) > MAX_MESSAGES:
        raise row.fault(f"{len(value)} messages, above the limit of {MAX_MESSAGES}.")
    messages: list[Message] = []
    for position, item in enumerate(value):
        at = f"{column}[{position}]"
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise row.fault(f'{at} is {{"role": ..., "content": "text"}}.')
        if item.get("role") not in ROLES:
            raise row.fault(f"{at}.role is {str(item.get('role'))[:40]!r}; use one of {', '.join(ROLES)}.")
        if item["role"] == "system" and position > 0:
            raise row.fault(f"{at}.role is 'system'; only the first message may be.")
        messages.append(Message(cast(Role, item["role"]), clean_text(item["content"]).strip()))
    return messages


def checked_text(row: RawRow, column: str) -> str:
    """The cleaned text of a column; empty where the column is missing or null.

    Raises:
        InvalidData: it holds something else than text.
    """
    value = row.data.get(column)
    if value is not None and not isinstance(value, str):
        raise row.fault(f"{column} is text, not {type(value).__name__}.")
    return clean_text(value or "").strip()


def checked_metadata(row: RawRow) -> dict[str, Any]:
    """What the row says about itself, its texts cleaned; empty where it says nothing.

    Raises:
        InvalidData: ``metadata`` is no object.
    """
    metadata = row.data.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise row.fault(f"metadata is an object, not {type(metadata).__name__}.")
    return {key: clean_text(value) if isinstance(value, str) else value for key, value in metadata.items()}


def asked(messages: Iterable[Message]) -> str:
    """All that the user said: what a held-out split must not share with training, whatever was answered."""
    return "\n".join(message.content for message in messages if message.role == "user")


def said(messages: Iterable[Message]) -> str:
    """All that was said but system prompts."""
    return "\n".join(f"{message.role}: {message.content}" for message in messages if message.role != "system")


def count_duplicates(rows: Iterable[Row]) -> int:
    """How many rows repeat the questions and answers of an earlier one."""
    seen = [content_hash(row.text) for row in rows]
    return len(seen) - len(set(seen))


def count_asked_in_both(trained: Iterable[Row], held_out: Iterable[Row]) -> int:
    """How many held-out rows ask the same as a training row."""
    seen = {content_hash(row.asked) for row in trained}
    return sum(content_hash(row.asked) in seen for row in held_out)


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


def _lines(path: Path, name: str) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_ROW_BYTES + 1), b""), 1):
            if len(line) > MAX_ROW_BYTES:
                raise InvalidData(f"{name} line {number}: the row is longer than {MAX_ROW_BYTES} bytes; shorten it.", param=name)
            if line.strip():
                yield number, line


def _object(line: bytes, *, where: str, name: str, what: str) -> RawRow:
    text = decode_utf8(line, name=where)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # a plain ValueError: an integer of more digits than Python converts
        raise InvalidData(f"{where}: not JSON ({error}); a {what} file has one JSON object per line (JSONL).", param=name) from None
    if not isinstance(data, dict):
        raise InvalidData(f"{where}: a row is a JSON object, not {type(data).__name__}.", param=name)
    return RawRow(data, where, name)
