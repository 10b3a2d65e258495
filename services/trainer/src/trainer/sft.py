"""Stage sft: supervised fine-tuning of a new LoRA adapter on questions and answers; the loss counts answers only."""

from __future__ import annotations

from pathlib import Path

from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.stages import SftConfig, TrainResult
from trainer import ranks
from trainer.backends import choose
from trainer.ranks import Group


def run(config: SftConfig, *, workdir: Path, progress: Progress) -> TrainResult:
    """Train on ``config.data``; goes on from checkpoints in ``workdir``.

    Leaves a PEFT adapter in ``workdir/"output"``, or without ``lora`` all weights (:mod:`parampara.weights.full`).

    ``config.model`` is the base with the DAPT adapter merged in; its ``merge.json`` becomes the adapter's lineage.

    Raises:
        InvalidData, InvalidRequest: a row, the model directory or a setting can not work.
        Preempted, Diverged, OutOfMemory: stopped on request with a checkpoint; loss not finite; memory too small.
    """
    return ranks.run(config, train, workdir=workdir.resolve(), progress=progress)


def train(config: SftConfig, *, workdir: Path, progress: Progress, group: Group) -> TrainResult:
    """What each process of the stage does."""
    progress.phase("start backend")
    with stop.interruptible("while the backend started"):
        choice = choose(config.backend, cache=workdir / "unsloth", full=config.params.lora is None, processes=group.size)
        from trainer.chat import build_rows
        from trainer.engine import train_adapter  # after the backend: Unsloth must be imported before transformers

    if config.params.train.packing:
        progress.event("packing is for plain text; each question with its answer stays a row of its own", level="warn")
    return train_adapter(config, choice=choice, build=build_rows, workdir=workdir, progress=progress, group=group)
