"""Champion against candidate on the same held-out questions: what flipped, and is the difference more than chance?

The interval is that of the paired bootstrap (Efron and Tibshirani 1993; for language processing Koehn 2004): questions are drawn
again with replacement, both models' results of a question together, and the 2.5th and 97.5th percentile of the mean difference are
its bounds. Pairing takes out that some questions are hard for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from parampara.errors import InvalidData
from parampara.schemas.comparison import Comparison, Flip, Interval, Item, ItemAnswer
from parampara.schemas.metrics import last_merged

ITEMS_NAME = "items.jsonl"
RESAMPLES = 10_000
_CHUNK = 1 << 22
"""Numbers drawn at once: 32 MiB."""


def read_items(directory: Path) -> list[Item] | None:
    """The items of an evaluation artifact; None where an earlier version stored none.

    Raises:
        InvalidData: items.jsonl is not what it has to be; names the line.
    """
    path = directory / ITEMS_NAME
    if not path.is_file():
        return None
    items = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            items.append(Item.model_validate_json(line))
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise InvalidData(f"{ITEMS_NAME} of the champion, line {number}: {where}: {fault['msg']}", param="champion") from None
    return items


def compare(champion: Sequence[Item], candidate: Sequence[Item], *, seed: int) -> Comparison | None:
    """The served models of both lines on the questions that both were asked; None if there is no such question."""
    known = {item.id: served for item in champion if (served := _served(item)) is not None}
    pairs = [(item, known[item.id], served) for item in candidate if item.id in known and (served := _served(item)) is not None]
    if not pairs:
        return None
    flips = [_flip(item, old, new) for item, old, new in pairs if old.exact != new.exact]
    losses = [new.loss - old.loss for _, old, new in pairs if old.loss is not None and new.loss is not None]
    return Comparison(
        items=len(pairs),
        won=sum(flip.to == "won" for flip in flips),
        lost=sum(flip.to == "lost" for flip in flips),
        exact=paired_bootstrap([float(new.exact) - float(old.exact) for _, old, new in pairs], seed=seed),
        loss=paired_bootstrap(losses, seed=seed) if losses else None,
        flips=flips,
    )


def paired_bootstrap(differences: Sequence[float], *, seed: int, resamples: int = RESAMPLES) -> Interval:
    """Mean of the per-item differences and its 95 % percentile interval; equal for an equal seed.

    Raises:
        ValueError: there is no difference.
    """
    if not len(differences):
        raise ValueError("no difference to resample")
    values = np.asarray(differences, dtype=np.float64)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    means = [
        values[generator.integers(len(values), size=(min(rows, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(value=float(values.mean()), low=float(low), high=float(high))


def _served(item: Item) -> ItemAnswer | None:
    """Of the model that is served: the last one that the line has."""
    return item.models.get("quantized") or item.models.get(last_merged(item.models))


def _flip(item: Item, champion: ItemAnswer, candidate: ItemAnswer) -> Flip:
    return Flip(
        id=item.id,
        question=item.question,
        expected=item.expected,
        champion=champion.answer,
        candidate=candidate.answer,
        to="won" if candidate.exact else "lost",
    )
