"""Training rows as token ids and labels, for all stages."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

IGNORED = -100
"""Label of a position that is not learnt from (the default ``ignore_index`` of torch's cross entropy)."""


@dataclass(frozen=True)
class TokenRow:
    """One row of an effective batch: a document, a conversation, or several documents in one block.

    ``labels[i]`` is ``input_ids[i]`` or ``IGNORED``; the shift by one position happens in the model. ``parts`` are the lengths
    of the documents, in order; none of them sees another.
    """

    input_ids: list[int]
    labels: list[int]
    parts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (len(self.input_ids),))

    @property
    def trained(self) -> int:
        """How many positions give a loss: the first of a document never does, nothing stands before it."""
        return sum(label != IGNORED for part in self.split() for label in part.labels[1:])

    def split(self) -> list[TokenRow]:
        """Its documents as rows of their own."""
        if len(self.parts) == 1:
            return [self]
        rows, start = [], 0
        for length in self.parts:
            rows.append(TokenRow(self.input_ids[start : start + length], self.labels[start : start + length]))
            start += length
        return rows


@dataclass(frozen=True)
class StageData:
    """What a stage trains on and validates with; ``facts`` go into training.json."""

    train: Sequence[TokenRow]
    validation: Sequence[TokenRow]
    facts: dict[str, int | float | str]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps([_sha256(self.train), _sha256(self.validation)]).encode()).hexdigest()


def _sha256(rows: Sequence[TokenRow]) -> str:
    if isinstance(rows, Fingerprinted):
        return rows.sha256()
    digest = hashlib.sha256(str(len(rows)).encode())
    for row in rows:
        digest.update(array("q", [len(row.parts), *row.parts]).tobytes())
        digest.update(array("q", row.input_ids).tobytes())
        digest.update(array("q", row.labels).tobytes())
    return digest.hexdigest()


@runtime_checkable
class Fingerprinted(Protocol):
    """Rows that know what they are without being read."""

    def sha256(self) -> str: ...
