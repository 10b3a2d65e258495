"""What a run that no longer learns looks like: numbers that are none, or a loss that has left its band for good."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch

from parampara.errors import Diverged

RUNAWAY_STEPS = 50
"""For so many steps in a row the loss has to lie above ``RUNAWAY_FACTOR`` times the median of those before."""
RUNAWAY_FACTOR = 3.0
_MEDIAN_OF = 500


def require_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights, or optimizer state, that are not numbers.

    Raises:
        Diverged: names the first tensor at fault.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise Diverged(f"{name} holds values that are not finite; nothing of it was kept. Try a lower learning rate.")


def require_no_runaway(losses: Sequence[float]) -> None:
    """Refuse a loss that has jumped and stays up: training on would cost hours and keep ever worse checkpoints.

    Raises:
        Diverged: gives both figures.
    """
    before, now = losses[-RUNAWAY_STEPS - _MEDIAN_OF : -RUNAWAY_STEPS], losses[-RUNAWAY_STEPS:]
    if len(before) < RUNAWAY_STEPS:
        return
    usual = statistics.median(before)
    if usual > 0 and min(now) > RUNAWAY_FACTOR * usual:  # a loss of preferences may be negative, and no factor says what is high then
        raise Diverged(
            f"Step {len(losses)}: the loss has been above {RUNAWAY_FACTOR:g} times its usual {usual:.4f} for {RUNAWAY_STEPS} steps (now "
            f"{now[-1]:.4f}). Try a lower learning rate."
        )
