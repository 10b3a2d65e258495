"""Which rows are trained on together, in which order: decided before the first step, from lengths and seed alone.

The whole run is one list of optimizer steps. Nothing is drawn while training, so the data position after step *n* is *n*, a
resumed run sees exactly the rows that it would have seen, and a test can look at the plan without a model.

A step holds the rows of one effective batch, drawn as any shuffling loader draws them. How they are laid out in memory is no
part of the mathematics: a :class:`trainer.layout.Layout` cuts each step into micro-batches that waste little.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """``batches[i]`` holds the row indices of optimizer step ``i`` (the last one perhaps fewer)."""

    batches: list[list[int]]
    rows: int
    """In the data set."""

    @property
    def steps(self) -> int:
        return len(self.batches)

    @property
    def sha256(self) -> str:
        """Of the order: two plans with the same one train on the same rows step by step."""
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(json.dumps(batch).encode())
        return digest.hexdigest()

    def epoch_at(self, step: int) -> float:
        return sum(len(batch) for batch in self.batches[:step]) / self.rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def plan_batches(
    rows: int, *, per_step: int, epochs: float, max_steps: int | None, seed: int, cost: Callable[[Sequence[int]], tuple[int, int]]
) -> Plan:
    """Shuffle the rows of each epoch, cut them into steps of ``per_step`` and put the costliest full step first.

    ``cost`` of a step's rows is what memory it takes; the greatest comes first, so that memory that will not do shows at
    step 1. ``max_steps`` overrides ``epochs``.
    """
    wanted = max_steps * per_step if max_steps is not None else max(1, round(epochs * rows))
    stream: list[int] = []
    for epoch in range(math.ceil(wanted / rows)):
        order = list(range(rows))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        stream += order
    batches = [stream[start : min(start + per_step, wanted)] for start in range(0, wanted, per_step)]
    full = [i for i, batch in enumerate(batches) if len(batch) == per_step]
    if full:
        heaviest = max(full, key=lambda i: cost(batches[i]))
        batches[0], batches[heaviest] = batches[heaviest], batches[0]
    return Plan(batches=batches, rows=rows)
