"""The documents of one optimizer step, shared out over the ranks: about as many tokens for each, and as many passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer.layout import Layout
from trainer.ranks import Group
from trainer.rows import TokenRow

IDLE = "idle"
"""In a micro-batch: it is there because another rank has one more, and its loss is nothing."""


def balanced(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Indices of the items of each share: the longest item left goes to the share that has least (Graham 1969, within 4/3 of the best)."""
    found: list[list[int]] = [[] for _ in range(shares)]
    held = [0] * shares
    for item in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        least = held.index(min(held))
        found[least].append(item)
        held[least] += lengths[item]
    return found


def micro_batches(rows: Sequence[TokenRow], layout: Layout, group: Group) -> list[dict[str, Any]]:
    """This rank's micro-batches of a step, as many as every other rank has: a sharded layer needs all of them in each pass."""
    if group.size == 1:
        return layout.collate(rows)
    documents = [document for row in rows for document in row.split()]
    lengths = [len(document.input_ids) for document in documents]
    shares = balanced(lengths, group.size)
    batches = layout.collate([documents[item] for item in shares[group.rank]])
    passes = max(len(layout.groups([lengths[item] for item in share])) for share in shares)
    learning = [document for document in documents if document.trained] or documents
    shortest = min(learning, key=lambda document: len(document.input_ids))
    return batches + [{**layout.collate([shortest])[0], IDLE: True} for _ in range(passes - len(batches))]
