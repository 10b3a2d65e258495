"""From a stage's settings and rows to the steps of its run: which rows, how laid out in memory."""

from __future__ import annotations

from typing import Any

from parampara.progress import Progress
from parampara.schemas.stages import DpoConfig
from trainer.backends import Choice
from trainer.building import Config
from trainer.layout import Layout, choose_layout
from trainer.plan import Plan, plan_batches
from trainer.precision import Hardware
from trainer.preferences import PairLayout
from trainer.rows import StageData
from trainer.store import parts_of


def fit_layout(config: Config, *, choice: Choice, hardware: Hardware, model: Any, tokenizer: Any) -> Layout:
    """How the rows of a step lie in memory, tried on the model; sets its attention."""
    train = config.params.train
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    limit = train.max_tokens_per_batch
    if limit is None:
        limit = train.per_device_train_batch_size * train.max_seq_length
        if hardware.device.type == "cpu":
            limit = min(limit, _CPU_TOKENS)
    if isinstance(config, DpoConfig):
        return PairLayout("padded", "the two answers of a pair are computed together", limit, padding or 0)
    return choose_layout(
        model, backend=choice.name, max_tokens=limit, longest=train.max_seq_length, pad_token_id=padding or 0, autocast=hardware.autocast
    )


_CPU_TOKENS = 2048
"""Of a micro-batch on a CPU where nothing is set: more is no faster and leaves the caches."""


def plan_steps(config: Config, data: StageData, layout: Layout) -> Plan:
    """Which rows each optimizer step learns from."""
    train = config.params.train
    parts = parts_of(data.train)
    return plan_batches(
        len(parts),
        per_step=train.per_device_train_batch_size * train.gradient_accumulation_steps,
        epochs=train.epochs,
        max_steps=train.max_steps,
        seed=config.seed,
        cost=lambda rows: layout.cost([length for row in rows for length in parts[row]]),
    )


def announce(config: Config, data: StageData, layout: Layout, plan: Plan, progress: Progress) -> None:
    """Tell what will be computed, and warn of what costs quality or speed."""
    train = config.params.train
    facts = {
        "train_rows": len(data.train),
        "validation_rows": len(data.validation),
        "steps": plan.steps,
        "layout": layout.kind,
        "max_tokens_per_batch": layout.max_tokens,
    }
    progress.event("data ready", **{**data.facts, **facts})
    if layout.kind == "padded" and not isinstance(config, DpoConfig):
        progress.event(layout.reason, level="warn")
    if data.facts.get("truncated_rows"):
        progress.event(
            f"{data.facts['truncated_rows']} rows are longer than max_seq_length ({train.max_seq_length}) and were cut", level="warn"
        )
    if data.facts.get("asked_in_both"):
        progress.event(
            f"{data.facts['asked_in_both']} of {len(data.validation)} validation rows ask what a training row asks too: their loss tells "
            "of memory; bring other questions",
            level="warn",
        )
