"""Stage dpo: direct preference optimization of a further LoRA adapter on pairs of a better and a worse answer."""

from __future__ import annotations

from pathlib import Path

from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.stages import DpoConfig, TrainResult
from trainer import ranks
from trainer.backends import choose
from trainer.ranks import Group


def run(config: DpoConfig, *, workdir: Path, progress: Progress) -> TrainResult:
    """Train on ``config.data`` and leave a PEFT adapter in ``workdir/"output"``; goes on from checkpoints in ``workdir``.

    ``config.model`` is the base with the DAPT and SFT adapters merged in: what the answers are held against. The losses are TRL's,
    means over pairs.

    Raises:
        InvalidData, InvalidRequest: a pair, the model directory or a setting can not work.
        Preempted, Diverged, OutOfMemory: stopped on request with a checkpoint; loss not finite; memory too small.
    """
    return ranks.run(config, train, workdir=workdir.resolve(), progress=progress)


def train(config: DpoConfig, *, workdir: Path, progress: Progress, group: Group) -> TrainResult:
    """What the process of the stage does; ``group`` is always that one alone."""
    progress.phase("start backend")
    with stop.interruptible("while the backend started"):
        choice = choose(config.backend, cache=workdir / "unsloth")
        from trainer.engine import train_adapter
        from trainer.preferences import build_rows  # after the backend: Unsloth must be imported before transformers

    if config.params.train.packing:
        progress.event("packing is for plain text; the two answers of a pair are always computed together", level="warn")
    return train_adapter(config, choice=choice, build=build_rows, workdir=workdir, progress=progress)
