"""Out of memory while training: the same step again in smaller parts, with the same effective batch and the same loss.

Each micro-batch is split by rows in two, in four and so on, and its parts are trained one after the other: half the
micro-batch, twice the accumulation. A part's loss is the sum over its learnt tokens divided by those of the *step*, so the
parts add up to what the whole gives (exactly, but for the order of additions; dropout draws other masks).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parampara.errors import OutOfMemory
from parampara.schemas.stages import TrainParams


class MicroBatch(dict[str, Any]):
    """A collated micro-batch that remembers its rows, so that parts of it can be collated anew, whatever its form."""

    rows: Sequence[Any] = ()


class Collator:
    """Wraps the data collator of the trainer: list of rows to :class:`MicroBatch`."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, rows: Sequence[Any]) -> MicroBatch:
        batch = MicroBatch(self._collate(list(rows)))
        batch.rows = rows
        return batch

    def parts(self, batch: MicroBatch, count: int) -> Iterator[MicroBatch]:
        """``batch`` in at most ``count`` parts of nearly equal numbers of rows; itself where one is asked for."""
        size = rows_per_part(batch, count)
        if size >= len(batch.rows):
            yield batch
            return
        for start in range(0, len(batch.rows), size):
            yield self(batch.rows[start : start + size])


def rows_per_part(batch: MicroBatch, count: int) -> int:
    return max(1, -(-len(batch.rows) // count))


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU (``torch.OutOfMemoryError``, and the texts of libraries that raise something else) or of this machine."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def release() -> None:
    """Give back what the failed attempt held. Call outside its ``except``: a traceback keeps every activation alive."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def out_of_memory(train: TrainParams, error: BaseException, *, step: int | None = None) -> OutOfMemory:
    """The error that a user sees: what was tried, and what makes it smaller. ``step``: not even one row of that step fits."""
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if step is None:
        what = f"Out of memory at per_device_train_batch_size {train.per_device_train_batch_size}, max_seq_length {train.max_seq_length}."
        advice = "Halve the batch size and double gradient_accumulation_steps (the same training), "
    else:
        what = f"Out of memory at step {step} with a micro-batch of one row, at most max_seq_length {train.max_seq_length} tokens long."
        advice = ""
    ways = ["shorten max_seq_length", *([] if train.load_in_4bit else ["set load_in_4bit (QLoRA)"])]
    if not train.gradient_checkpointing:
        ways.insert(0, "turn gradient_checkpointing on")
    advice += ("or " if advice else "") + " or ".join(ways)
    field = "max_seq_length" if step is not None else "per_device_train_batch_size"
    return OutOfMemory(f"{what} {advice[0].upper()}{advice[1:]}. ({reason})", param=f"params.train.{field}")
