"""Mean loss per learnt token over held-out rows: the number behind every perplexity that the trainer reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from parampara.errors import Diverged, Preempted
from trainer.layout import Layout
from trainer.precision import Hardware
from trainer.ranks import ALONE, Group
from trainer.rows import IGNORED, TokenRow
from trainer.store import parts_of

TOKENS_PER_BATCH = 2048


def mean_loss(
    model: Any, rows: Sequence[TokenRow], *, layout: Layout, hardware: Hardware, stopped: Callable[[], bool], group: Group = ALONE
) -> float:
    """Negative log likelihood per learnt token, in nats, without dropout. Leaves the model in evaluation mode.

    The ranks of ``group`` share the rows and have one result.

    Raises:
        Preempted: a stop was asked for while it ran.
        Diverged: the loss is not finite.
    """
    model.eval()
    total, tokens = 0.0, 0
    whole = replace(layout, max_tokens=min(TOKENS_PER_BATCH, layout.max_tokens))
    for inputs, counts in group.deal(_micro_batches(rows, whole, stopped)):
        count = int((inputs["labels"][:, 1:] != IGNORED).sum())
        moved = {key: value.to(hardware.device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        with torch.no_grad(), hardware.autocast():
            loss = model(**moved, use_cache=False).loss
        if counts:
            total += float(loss) * count
            tokens += count
    total, tokens = group.sums(total, tokens)
    result = total / tokens
    if not math.isfinite(result):
        raise Diverged(f"The validation loss is {result}: the model's weights do not work in {hardware.dtype}.")
    return result


def _micro_batches(rows: Sequence[TokenRow], layout: Layout, stopped: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    for batch in _batches(rows):
        if stopped():
            raise Preempted("Stopped while validating, as asked.")
        yield from layout.collate(batch)


def _batches(rows: Sequence[TokenRow]) -> Iterator[list[TokenRow]]:
    """Rows of similar length together, at most ``TOKENS_PER_BATCH`` padded positions in a batch (or one row)."""
    lengths = [sum(parts) for parts in parts_of(rows)]
    batch: list[TokenRow] = []
    for number in sorted(range(len(rows)), key=lambda number: lengths[number]):
        if batch and lengths[number] * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        if (row := rows[number]).trained:
            batch.append(row)
    if batch:
        yield batch
