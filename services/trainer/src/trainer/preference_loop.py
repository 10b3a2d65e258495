"""What preferences change in the loop: a loss by pairs instead of tokens, and how often the better answer wins.

The loss is that of TRL's ``DPOTrainer``, the mean over the pairs of a micro-batch; here it is weighed by their share in the step. The
reference is the same model with its adapter switched off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from parampara.errors import Diverged, Preempted
from trainer import memory
from trainer.layout import Layout
from trainer.loop import StageLoop
from trainer.precision import Hardware
from trainer.preferences import pairs_in
from trainer.rows import TokenRow
from trainer.validation import TOKENS_PER_BATCH

_FIGURES = {"reward_accuracy": "rewards/accuracies", "reward_margin": "rewards/margins"}
"""Our names to those of ``DPOTrainer``, which notes a mean for each micro-batch."""
_PAIRS_PER_BATCH = 16


class PreferenceLoop(StageLoop):
    """Mixin over ``trl.DPOTrainer``."""

    _metrics: dict[str, dict[str, list[float]]]

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset  # the rows are tokenized

    def items_of(self, rows: Sequence[TokenRow]) -> int:
        return len(rows)

    def items_in(self, batch: dict[str, Any]) -> int:
        return pairs_in(batch)

    def micro_step(self, model: Any, batch: dict[str, Any], num_items_in_batch: Any) -> None:
        super().micro_step(model, batch, num_items_in_batch)
        self._note("train", batch)

    def _train_on(self, model: Any, rows: list[TokenRow], num_items_in_batch: Any) -> torch.Tensor:
        before = dict(self._sums["train"])
        try:
            return super()._train_on(model, rows, num_items_in_batch)
        except BaseException:
            self._sums["train"] = before  # the step is trained again as a whole, in smaller micro-batches
            raise

    def figures_of_step(self) -> dict[str, float]:
        return self._noted("train")

    def held_out_loss(self, model: Any, rows: Sequence[TokenRow], *, layout: Layout, hardware: Hardware) -> float:
        """Mean loss per pair, without dropout. Leaves the model in evaluation mode, and ``held_out_figures`` of these rows.

        Raises:
            Preempted: a stop was asked for while it ran.
            Diverged: the loss is not finite.
        """
        model.eval()
        self._forget("eval")
        total = 0.0
        layout = memory.smaller(replace(layout, max_tokens=min(TOKENS_PER_BATCH, layout.max_tokens)), self.run.ledger.parts)
        for start in range(0, len(rows), _PAIRS_PER_BATCH):
            for batch in layout.collate(rows[start : start + _PAIRS_PER_BATCH]):
                if self.run.stopped():
                    raise Preempted("Stopped while validating, as asked.")
                moved = {key: value.to(hardware.device) for key, value in batch.items()}
                with torch.no_grad(), hardware.autocast():
                    total += float(self.loss_of(model, moved)) * pairs_in(batch)
                self._note("eval", batch)
        self.held_out_figures = self._noted("eval")
        loss = total / len(rows)
        if not math.isfinite(loss):
            raise Diverged(f"The validation loss is {loss}: the model's weights do not work in {hardware.dtype}.")
        return loss

    def loss_of(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """The library's own loss of one batch: the mean over its pairs."""
        return super(StageLoop, self).compute_loss(model, batch)  # type: ignore[misc]

    def _forget(self, mode: str) -> None:
        self._metrics[mode].clear()
        self._sums[mode] = dict.fromkeys(("pairs", *_FIGURES), 0.0)

    def _note(self, mode: str, batch: dict[str, Any]) -> None:
        """Add up what the library has noted of one micro-batch, and let go of it: its own list would grow for the whole run."""
        pairs, sums = pairs_in(batch), self._sums[mode]
        sums["pairs"] += pairs
        for name, theirs in _FIGURES.items():
            sums[name] += self._metrics[mode][theirs][-1] * pairs
        self._metrics[mode].clear()

    def _noted(self, mode: str) -> dict[str, float]:
        """Means over the pairs since the last call."""
        sums = dict(self._sums[mode])
        self._forget(mode)
        return {name: sums[name] / sums["pairs"] for name in _FIGURES}

    def start(self, run: Any) -> None:
        super().start(run)
        self._sums: dict[str, dict[str, float]] = {}
        for mode in ("train", "eval"):
            self._forget(mode)
