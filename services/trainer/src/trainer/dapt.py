"""Stage dapt: domain-adaptive pretraining of a LoRA adapter on plain text in packed blocks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.stages import DaptConfig, TrainResult
from trainer import ranks
from trainer.backends import choose
from trainer.ranks import Group


def run(config: DaptConfig, *, workdir: Path, progress: Progress) -> TrainResult:
    """Train on ``config.data``; goes on from checkpoints in ``workdir``.

    Leaves a PEFT adapter in ``workdir/"output"``, or without ``lora`` all weights (:mod:`parampara.weights.full`).

    The validation loss and perplexity are those of held-out chunks, before (base alone) and after.

    Raises:
        InvalidData, InvalidRequest: a book, the model directory or a setting can not work.
        Preempted, Diverged, OutOfMemory: stopped on request with a checkpoint; loss not finite; memory too small.
    """
    return ranks.run(config, train, workdir=workdir.resolve(), progress=progress)


def train(config: DaptConfig, *, workdir: Path, progress: Progress, group: Group) -> TrainResult:
    """What each process of the stage does."""
    progress.phase("start backend")
    with stop.interruptible("while the backend started"):
        choice = choose(config.backend, cache=workdir / "unsloth", full=config.params.lora is None, processes=group.size)
        from trainer.blocks import build_rows
        from trainer.engine import train_adapter  # after the backend: Unsloth must be imported before transformers

    return train_adapter(
        config,
        choice=choice,
        build=partial(build_rows, workdir=workdir, progress=progress),
        workdir=workdir,
        progress=progress,
        group=group,
    )
