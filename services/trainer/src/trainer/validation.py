"""Mean loss per learnt token over held-out rows: the number behind every perplexity that the trainer reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from parampara.errors import Diverged, Preempted
from trainer.precision import Hardware
from trainer.rows import TokenRow

_TOKENS_PER_BATCH = 2048


def mean_loss(
    model: Any, rows: Sequence[TokenRow], *, collate: Callable[[list[Any]], Any], hardware: Hardware, stopped: Callable[[], bool]
) -> float:
    """Negative log likelihood per learnt token, in nats, without dropout. Leaves the model in evaluation mode.

    Raises:
        Preempted: a stop was asked for while it ran.
        Diverged: the loss is not finite.
    """
    model.eval()
    total, tokens = 0.0, 0
    mixed = hardware.dtype != "float32"
    for batch in _batches(rows):
        if stopped():
            raise Preempted("Stopped while validating, as asked.")
        count = sum(row.trained for row in batch)
        inputs = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in batch])
        inputs = {key: value.to(hardware.device) for key, value in inputs.items()}
        with torch.no_grad(), torch.autocast(hardware.device.type, dtype=hardware.torch_dtype, enabled=mixed):
            loss = model(**inputs, use_cache=False).loss
        total += float(loss) * count
        tokens += count
    result = total / tokens
    if not math.isfinite(result):
        raise Diverged(f"The validation loss is {result}: the model's weights do not work in {hardware.dtype}.")
    return result


def _batches(rows: Sequence[TokenRow]) -> Iterator[list[TokenRow]]:
    """Rows of similar length together, at most ``_TOKENS_PER_BATCH`` padded positions in a batch (or one row)."""
    batch: list[TokenRow] = []
    for row in sorted((row for row in rows if row.trained), key=lambda row: len(row.input_ids)):
        if batch and len(row.input_ids) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
