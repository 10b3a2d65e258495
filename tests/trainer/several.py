"""Stages of several processes, forked from one that has imported the libraries: a start costs seconds less than that of the command."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from parampara.schemas.stages import DaptConfig, SftConfig, TrainResult
from tests.trainer.runs import steps_reported


class Attempt:
    """An attempt of a stage under the whole protocol, leader of a session of its own; its log is ``workdir/"log"``.

    ``setup`` runs in the process before the stage; the other ranks are forked from it and inherit what it changes.
    """

    def __init__(self, config: DaptConfig | SftConfig, workdir: Path, *, setup: Callable[[], None] | None = None) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        progress = workdir / "progress.jsonl"
        self._workdir, self._before = workdir, progress.stat().st_size if progress.exists() else 0
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.trainer.crashing"])
        self._process = context.Process(target=_stage, args=(config.kind, workdir, setup))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def at_step(self, step: int) -> list[psutil.Process]:
        """Wait until it reports ``step`` and return its other ranks."""
        while steps_reported(self._workdir, since=self._before) < step:
            assert self._process.exitcode is None, self.log()
            time.sleep(0.005)
        return psutil.Process(self.pid).children()

    def seconds_to_stop(self, processes: list[psutil.Process]) -> float:
        """Ask it to stop and wait until it has; the processor time that ``processes`` took for it."""
        before = after = sum(sum(process.cpu_times()[:2]) for process in processes)
        os.kill(self.pid, signal.SIGTERM)
        while self._process.is_alive():
            with contextlib.suppress(psutil.NoSuchProcess):
                after = sum(sum(process.cpu_times()[:2]) for process in processes)
            time.sleep(0.01)
        return after - before

    def code(self, within: float = 60) -> int:
        """Exit code, once it has ended."""
        self._process.join(within)
        assert self._process.exitcode is not None, "it hangs: " + self.log()
        return self._process.exitcode

    def left(self) -> list[psutil.Process]:
        """What runs of its session."""
        return [process for process in psutil.process_iter() if _session(process.pid) == self.pid and process.status() != "zombie"]

    def log(self) -> str:
        return (self._workdir / "log").read_text(encoding="utf-8")[-3000:]


def finished(config: DaptConfig | SftConfig, workdir: Path) -> TrainResult:
    """The result of an attempt that nobody disturbs."""
    attempt = Attempt(config, workdir)
    assert attempt.code() == 0, attempt.log()
    return TrainResult.model_validate_json((workdir / "result.json").read_bytes())


def error(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "error.json").read_text(encoding="utf-8"))["error"]


class Fails:
    """``Attempt(setup=...)``: rank ``rank`` raises in the first micro-batch of step ``step``."""

    def __init__(self, error: Exception, *, rank: int, step: int) -> None:
        self.error, self.rank, self.step = error, rank, step

    def __call__(self) -> None:
        from trainer.loop import StageLoop

        loop: Any = StageLoop
        original = loop.micro_step

        @functools.wraps(original)
        def failing(trainer: Any, *args: Any) -> None:
            if trainer.run.group.rank == self.rank and trainer.state.global_step + 1 == self.step:
                raise self.error
            original(trainer, *args)

        loop.micro_step = failing


class Dies:
    """``Attempt(setup=...)``: rank 1 is killed in the ``layer``-th layer that is run, of the passes that try the layout on the model."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __call__(self) -> None:
        from trainer import attention

        original = attention.attend

        @functools.wraps(original)
        def dying(*args: Any, **kwargs: Any) -> Any:
            import torch

            self.layer -= 1
            if torch.distributed.get_rank() == 1 and self.layer == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        attention.attend = dying


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def _stage(kind: str, workdir: Path, setup: Callable[[], None] | None) -> None:
    import torch

    from parampara.execution import child, stop
    from tests.trainer.crashing import STAGES

    os.setsid()
    log = os.open(workdir / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    stop.clear()
    if setup is not None:
        setup()
    code = child.run_stage(STAGES[kind], config=workdir / "config.json", workdir=workdir)
    sys.stderr.flush()
    os._exit(code)
