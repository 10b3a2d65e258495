"""Deterministic held-out split by content: which side an item is on depends on its content, the seed and the set, never on order.

Items of equal content (after case folding and white-space normalisation) have equal hashes and land on one side, so the
held-out side never overlaps training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from parampara.errors import InvalidData, InvalidRequest

Item = TypeVar("Item")


def content_hash(text: str) -> str:
    """sha256 of the text, case folded and with runs of white space as one space."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", errors="surrogatepass")).hexdigest()


def hold_out(
    items: Sequence[Item], *, fraction: float, seed: int, content: Callable[[Item], str], what: str = "rows"
) -> tuple[list[Item], list[Item]]:
    """Split into ``(train, held_out)``, each in the order given, with about ``fraction`` of the distinct items held out.

    ``content`` gives the text that must not be on both sides; ``what`` names the items in messages.

    Raises:
        InvalidData: fewer than two distinct items, so one side would be empty.
        InvalidRequest: ``fraction`` is not between 0 and 1.
    """
    hashes = [content_hash(content(item)) for item in items]
    held = held_out(hashes, fraction=fraction, seed=seed, what=what)
    train = [item for item, digest in zip(items, hashes, strict=True) if digest not in held]
    return train, [item for item, digest in zip(items, hashes, strict=True) if digest in held]


def held_out(hashes: Sequence[str], *, fraction: float, seed: int, what: str = "rows") -> set[str]:
    """The hashes (:func:`content_hash`) of the items that :func:`hold_out` holds out, for a set too large to be at hand.

    Raises:
        As :func:`hold_out`.
    """
    if not 0 < fraction < 1:
        raise InvalidRequest(f"validation_fraction is {fraction}; it must lie between 0 and 1.", param="validation_fraction")
    ordered = sorted(set(hashes), key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest())
    if len(ordered) < 2:
        raise InvalidData(
            f"{len(hashes)} {what} of {len(ordered)} distinct content: training and validation need at least one each; bring more data.",
            param="data",
        )
    count = min(max(1, round(len(ordered) * fraction)), len(ordered) - 1)
    return set(ordered[:count])
