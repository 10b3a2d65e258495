"""Attempts of a stage in processes forked from one that has imported the libraries: a crash point costs less than a second.

An attempt runs under the whole protocol of a stage process (:func:`parampara.execution.child.run_stage`). It counts the
moments that it passes (before and after each micro-batch, optimizer step, file, rename, removal...) and, at the one it was
told, sends itself a signal: every moment can be met again by its number.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read once, when torch is imported; nothing may run threads before the fork

import datasets  # noqa: F401
import peft  # noqa: F401
import pytest  # noqa: F401  (the child imports the main module of its parent)
import torch
import transformers
import trl
from accelerate.optimizer import AcceleratedOptimizer
from transformers.models.llama import modeling_llama  # noqa: F401

import trainer.backends.trl  # noqa: F401
from parampara.execution import child, stop
from parampara.schemas.stages import DaptConfig, SftConfig
from trainer import checkpoints, dapt, engine, loop, output, sft

_ = trl.SFTTrainer, transformers.Trainer  # lazy imports, done once and not in every child
STAGES = {"dapt": child.Stage(DaptConfig, lambda: dapt.run), "sft": child.Stage(SftConfig, lambda: sft.run)}
MOMENTS: list[tuple[Any, str]] = [
    (engine, "load_model"),
    (loop, "mean_loss"),
    (engine, "write_output"),
    (loop.StageLoop, "micro_step"),
    (loop.StageLoop, "_get_grad_norm"),
    (AcceleratedOptimizer, "step"),
    (loop, "append_metrics"),
    (loop, "save_tensors"),
    (loop, "write_atomically"),
    (output, "save_tensors"),
    (child, "write_atomically"),
    (os, "fsync"),
    (os, "rename"),
    (shutil, "rmtree"),
    (checkpoints, "sha256_file"),
]


def attempt(
    config: DaptConfig | SftConfig,
    workdir: Path,
    *,
    at: int = 0,
    number: int = signal.SIGKILL,
    setup: Callable[[], None] | None = None,
    notes: Path | None = None,
) -> int:
    """Run an attempt and return its exit code; at moment ``at`` (from 1; 0: never) it sends itself the signal ``number``.

    ``setup`` runs in the process before the stage. Its log and what it tells go to ``notes``, which is ``workdir`` unless given.
    """
    notes = notes or workdir
    notes.mkdir(parents=True, exist_ok=True)
    file = notes / "config.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_child, args=(config.kind, workdir, notes, at, number, setup))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the attempt hangs"
    return process.exitcode


def told(notes: Path) -> dict[str, Any]:
    """What the last attempt that came to an end says of itself: ``moments`` passed, ``seconds`` of CPU from the signal to its end."""
    return json.loads((notes / "told.json").read_text(encoding="utf-8"))


def _child(kind: str, workdir: Path, notes: Path, at: int, number: int, setup: Callable[[], None] | None) -> None:
    log = os.open(notes / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    stop.clear()
    passed, signalled = 0, 0.0

    def moment() -> None:
        nonlocal passed, signalled
        passed += 1
        if passed == at:
            signalled = time.process_time()
            os.kill(os.getpid(), number)

    for owner, name in MOMENTS:
        setattr(owner, name, _counted(getattr(owner, name), moment))
    if setup is not None:
        setup()
    code = child.run_stage(STAGES[kind], config=notes / "config.json", workdir=workdir)
    seconds = time.process_time() - signalled if signalled else 0.0
    answer = {"moments": passed, "seconds": seconds, "cpu": time.process_time()}
    (notes / "told.json").write_text(json.dumps(answer), encoding="utf-8")
    sys.stderr.flush()
    os._exit(code)


def _counted(function: Callable[..., Any], moment: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        moment()
        result = function(*args, **kwargs)
        moment()
        return result

    return wrapper


class Poison:
    """``attempt(setup=...)``: one number of the loss, a gradient, a weight or the optimizer's state is not finite in step ``step``."""

    def __init__(self, what: str, value: str, *, step: int) -> None:
        self.what, self.value, self.step = what, float(value), step

    def __call__(self) -> None:
        owner, name = {
            "loss": (loop.StageLoop, "training_step"),
            "gradient": (transformers.Trainer, "_clip_grad_norm"),
            "weights": (loop.StageLoop, "_maybe_log_save_evaluate"),
            "optimizer": (loop.StageLoop, "_maybe_log_save_evaluate"),
        }[self.what]
        original = getattr(owner, name)

        @functools.wraps(original)
        def poisoned(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            if self.what in ("loss", "gradient") and trainer.state.global_step + 1 == self.step:
                self._poison(trainer)
            if self.what in ("weights", "optimizer") and trainer.state.global_step == self.step:
                self._poison(trainer)
            return original(trainer, *args, **kwargs)

        setattr(owner, name, poisoned)

    def _poison(self, trainer: Any) -> None:
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        if self.what == "loss":
            trainer.compute_loss = lambda model, inputs, **_: sum(p.sum() for p in model.parameters() if p.requires_grad) * self.value
        elif self.what == "gradient":
            parameter.grad.view(-1)[0] = self.value
        elif self.what == "weights":
            parameter.data.view(-1)[0] = self.value
        else:
            next(iter(trainer.optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = self.value
