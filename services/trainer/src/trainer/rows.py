"""Training rows as token ids and labels, for both stages."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

IGNORED = -100
"""Label of a position that is not learnt from (the default ``ignore_index`` of torch's cross entropy)."""


@dataclass(frozen=True)
class TokenRow:
    """``labels[i]`` is ``input_ids[i]`` or ``IGNORED``; the shift by one position happens in the model."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """How many positions give a loss: the first one never does, nothing stands before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class StageData:
    """What a stage trains on and validates with; ``facts`` go into training.json."""

    train: list[TokenRow]
    validation: list[TokenRow]
    facts: dict[str, int | float | str]

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256(json.dumps([len(self.train), len(self.validation)]).encode())
        for row in _both(self.train, self.validation):
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(array("q", row.input_ids).tobytes())
            digest.update(array("q", row.labels).tobytes())
        return digest.hexdigest()


def _both(*sides: list[TokenRow]) -> Iterable[TokenRow]:
    for side in sides:
        yield from side
