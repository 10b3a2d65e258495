"""Which rows are trained on together, in which order: decided before the first step, from lengths and seed alone.

The whole run is one list of micro-batches. Nothing is drawn while training, so the data position after step *n* is *n*, a
resumed run sees exactly the batches that it would have seen, and a test can look at the plan without a model.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_WINDOW = 64
"""Effective batches among which rows are sorted by length: enough to save padding, few enough to stay random. Of the KP example's
rows, an eighth of them ten times as long as the rest, 94 % of the positions are tokens with 64, 78 % with 16."""


@dataclass(frozen=True)
class Plan:
    """``batches[i]`` holds row indices; ``accumulation`` consecutive ones make a step (the last step may have fewer)."""

    batches: list[list[int]]
    accumulation: int
    lengths: Sequence[int]

    @property
    def steps(self) -> int:
        return math.ceil(len(self.batches) / self.accumulation)

    @property
    def efficiency(self) -> float:
        """Share of the trained positions that hold a token and not padding."""
        held = sum(self.lengths[row] for batch in self.batches for row in batch)
        return held / sum(len(batch) * max(self.lengths[row] for row in batch) for batch in self.batches)

    @property
    def sha256(self) -> str:
        """Of the order: two plans with the same one train on the same rows step by step."""
        return hashlib.sha256(json.dumps([self.accumulation, self.batches]).encode()).hexdigest()

    def epoch_at(self, step: int) -> float:
        rows = sum(len(batch) for batch in self.batches[: step * self.accumulation])
        return rows / len(self.lengths)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def plan_batches(lengths: Sequence[int], *, batch_size: int, accumulation: int, epochs: float, max_steps: int | None, seed: int) -> Plan:
    """Shuffle rows per epoch, group rows of similar length, and put the step with the longest row first.

    Each step holds ``batch_size * accumulation`` rows (the last one perhaps fewer). Longest first: memory that will not
    do shows at step 1. ``max_steps`` overrides ``epochs``.
    """
    per_step = batch_size * accumulation
    wanted = max_steps * per_step if max_steps is not None else max(1, round(epochs * len(lengths)))
    stream: list[int] = []
    for epoch in range(math.ceil(wanted / len(lengths))):
        order = list(range(len(lengths)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        stream += order
    steps = _group_by_length(stream[:wanted], lengths, per_step, random.Random(f"{seed}:groups"))
    full = [i for i, rows in enumerate(steps) if len(rows) == per_step]
    if full:
        longest = max(full, key=lambda i: max(lengths[row] for row in steps[i]))
        steps[0], steps[longest] = steps[longest], steps[0]
    batches = [rows[start : start + batch_size] for rows in steps for start in range(0, len(rows), batch_size)]
    return Plan(batches=batches, accumulation=accumulation, lengths=lengths)


def _group_by_length(stream: list[int], lengths: Sequence[int], per_step: int, chance: random.Random) -> list[list[int]]:
    """Rows of each step, longest first within the step; only the last step may be short."""
    steps: list[list[int]] = []
    # no wider than an epoch: sorting would lay a row beside its own repetitions
    window = per_step * max(1, min(_WINDOW, len(lengths) // per_step))
    for start in range(0, len(stream), window):
        rows = sorted(stream[start : start + window], key=lambda row: -lengths[row])
        short = len(rows) % per_step
        # the rows left over for a short last step are the window's shortest
        groups = [rows[i : i + per_step] for i in range(0, len(rows) - short, per_step)]
        chance.shuffle(groups)
        steps += groups + ([rows[len(rows) - short :]] if short else [])
    return steps
