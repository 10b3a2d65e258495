"""Out of memory while training: the same step again in smaller micro-batches, with the same effective batch and the same loss.

The token budget of a micro-batch is halved until it is below what failed: more micro-batches, each smaller. The loss of one is the
sum over its learnt tokens divided by those of the *step*, so they add up to what any other cut gives (exactly, but for the order
of additions; dropout draws other masks).
"""

from __future__ import annotations

from dataclasses import replace

from parampara.errors import OutOfMemory
from parampara.schemas.stages import TrainParams
from trainer.layout import Layout


def smaller(layout: Layout, parts: int) -> Layout:
    """``layout`` with its token budget divided by ``parts``; a longer document still is a micro-batch of its own."""
    return layout if parts == 1 else replace(layout, max_tokens=max(1, layout.max_tokens // parts))


def out_of_memory(train: TrainParams, error: BaseException, *, step: int | None = None, full: bool = False) -> OutOfMemory:
    """The error that a user sees: what was tried, and what makes it smaller. ``step``: not even one document of that step fits.

    ``full``: every weight is trained.
    """
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if step is None:
        limit = train.max_tokens_per_batch or f"unset (batch size {train.per_device_train_batch_size} x max_seq_length)"
        what = f"Out of memory at max_tokens_per_batch {limit}, max_seq_length {train.max_seq_length}."
        advice = "Halve max_tokens_per_batch (the same training), "
    else:
        what = (
            f"Out of memory at step {step} with a micro-batch of one document, at most max_seq_length {train.max_seq_length} tokens long."
        )
        advice = ""
    ways = ["shorten max_seq_length"]
    if full:
        ways.append("give lora (an adapter; every weight takes 16 bytes, 10 with optim adamw_8bit, beside the activations)")
    elif not train.load_in_4bit:
        ways.append("set load_in_4bit (QLoRA)")
    if not train.gradient_checkpointing:
        ways.insert(0, "turn gradient_checkpointing on")
    advice += ("or " if advice else "") + " or ".join(ways)
    field = "max_seq_length" if step is not None else "max_tokens_per_batch"
    return OutOfMemory(f"{what} {advice[0].upper()}{advice[1:]}. ({reason})", param=f"params.train.{field}")
