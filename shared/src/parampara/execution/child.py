"""The child side of the job protocol, and the command line of every service that has stages.

``python -m <service> <kind> --config FILE --workdir DIR`` runs one stage function; a worker starts exactly this command.
Under ``DIR`` it leaves ``progress.jsonl`` (while it runs), ``result.json`` or ``error.json``, and the stage's ``output``.
Exit codes: 0 done, 73 disk full, 74 another process works in ``DIR``, 75 preempted with a checkpoint, 76 diverged, 77 out of memory,
78 bad configuration or data, anything else or a signal: a crash. SIGTERM asks for a checkpoint and exit 75.

Two guards keep two attempts of a job apart: an flock on ``DIR/lock`` held for life (forked helpers inherit it), and the
kernel's parent-death signal when a supervisor started the process.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO

import yaml
from pydantic import BaseModel, ValidationError

from parampara.db.storable import storable
from parampara.errors import EXIT_OK, DiskFull, InvalidRequest, OutOfMemory, ParamparaError, WorkdirBusy
from parampara.execution import stop
from parampara.progress import JsonlProgress, Level
from parampara.schemas.recipe import invalid
from parampara.storage import write_atomically

SUPERVISOR_PID = "PARAMPARA_SUPERVISOR_PID"
_LOCK_WAIT_SECONDS = 30
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Stage:
    """One subcommand: the class of its config, and a function that imports and returns the stage function."""

    config: type[BaseModel]
    load: Callable[[], Callable[..., BaseModel | None]]
    preloadable: Callable[[Any], bool] = lambda config: True
    """Config to whether a process may run it that has imported already what ``preload`` of the service imports."""


def main(
    service: str,
    *,
    stages: Mapping[str, Stage],
    queue: str,
    preloads: Mapping[str, Callable[[], None]] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run a stage, or ``worker``, and exit with its code. ``preloads``: what :mod:`parampara.execution.preloaded` may import, by name."""
    arguments = _parser(service, stages, preloads or {}).parse_args(argv)
    if arguments.command == "preload":
        from parampara.execution import preloaded

        preloaded.serve(stages, imports=(preloads or {})[arguments.what], channel=arguments.channel)
    if arguments.command == "worker":
        from parampara.execution.worker import serve  # Celery and the database: not for a stage process

        sys.exit(serve(service, queue, preloads=sorted(preloads or {})))
    sys.exit(run_stage(stages[arguments.command], config=arguments.config, workdir=arguments.workdir))


def run_stage(stage: Stage, *, config: Path, workdir: Path) -> int:
    """Run one stage in this process under the child protocol and return its exit code."""
    die_with_supervisor()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the stall watchdog asks for this dump
    stop.install_handler()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock(workdir)
        with lock:
            _discard(workdir / "result.json", workdir / "error.json")
            shutil.rmtree(workdir / "output", ignore_errors=True)  # of an attempt that was killed before anybody took it
            progress = _EchoProgress(workdir / "progress.jsonl")
            share_the_cores()
            result = stage.load()(read_config(stage.config, config), workdir=workdir, progress=progress)
            body = "{}" if result is None else json.dumps(storable(result.model_dump(mode="json")))
            write_atomically(workdir / "result.json", body.encode())
            return EXIT_OK
    except WorkdirBusy as error:
        _say(error.message)
        return error.exit_code  # no error.json: the directory is somebody else's
    except ParamparaError as error:
        _say(f"{type(error).__name__}: {error.message}")
        return _report(workdir, error.body(), error.exit_code)
    except MemoryError:
        _say(traceback.format_exc())
        error = OutOfMemory("The stage ran out of memory; use a smaller batch or sequence length.")
        return _report(workdir, error.body(), error.exit_code)
    except Exception as error:  # noqa: BLE001 - the boundary of the process: whatever it was goes into error.json
        _say(traceback.format_exc())
        if (full := disk_full(error)) is not None:
            return _report(workdir, full.body(), full.exit_code)
        message = f"{type(error).__name__}: {error}"
        return _report(workdir, {"error": {"message": message, "type": "server_error", "param": None, "code": "stage_crashed"}}, 1)


def share_the_cores() -> None:
    """Let idle threads of the numeric libraries sleep instead of spin; before those are imported, they read it once.

    The cores belong to the database, the servers and the other stages too. A spinning thread holds a core that the thread it waits
    for may need: beside other work the tiny DAPT took four times the CPU time and four times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _parser(service: str, stages: Mapping[str, Stage], preloads: Mapping[str, Any]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {service}")
    commands = parser.add_subparsers(dest="command", required=True)
    for kind in stages:
        command = commands.add_parser(kind, help=f"run one {kind} stage on local paths")
        command.add_argument("--config", type=Path, required=True, help="JSON or YAML file with the stage's configuration")
        command.add_argument("--workdir", type=Path, required=True, help="private directory; holds checkpoints, progress and output")
    commands.add_parser("worker", help="take jobs from the queue until told to stop")
    if preloads:
        command = commands.add_parser("preload", help="import libraries and fork stages for the worker that has started this")
        command.add_argument("--what", choices=sorted(preloads), required=True)
        command.add_argument("--channel", type=int, required=True, help="inherited descriptor of a socket")
    return parser


def read_config(model: type[BaseModel], path: Path) -> BaseModel:
    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InvalidRequest(f"Cannot read the configuration {path}: {error}", param="config") from None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise invalid(error, param="config") from None


def _lock(workdir: Path) -> TextIO:
    """Take the workdir for life; wait a little for an attempt that is just dying."""
    file = (workdir / "lock").open("a+", encoding="utf-8")
    os.set_inheritable(file.fileno(), False)
    deadline = time.monotonic() + _LOCK_WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
            return file
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise WorkdirBusy(f"{holder} still works in {workdir}; it did not end within {_LOCK_WAIT_SECONDS} seconds.") from None
            time.sleep(0.1)


def die_with_supervisor() -> None:
    """Ask the kernel to kill this process when the supervising thread ends; nothing to do for a stage started by hand."""
    supervisor = os.environ.get(SUPERVISOR_PID)
    if supervisor is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(supervisor):  # it died before we asked
        sys.exit(1)


def _discard(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _say(text: str) -> None:
    """To the log; on a full disk there is none, and the exit code still has to be the right one."""
    with contextlib.suppress(OSError):
        print(text.rstrip(), file=sys.stderr, flush=True)


def disk_full(error: BaseException) -> DiskFull | None:
    """The error by its name where a full disk, a quota or a limit on file sizes is behind it, however a library has wrapped it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            where = f" for {cause.filename}" if cause.filename else ""
            advice = "Free disk space and retry the job; training goes on from its last checkpoint."
            return DiskFull(f"No room on the disk{where} ({cause.strerror}). {advice}")
        cause = cause.__cause__ or cause.__context__
    return None


def _report(workdir: Path, body: dict[str, Any], code: int) -> int:
    try:
        write_atomically(workdir / "error.json", json.dumps(body).encode())
    except OSError as error:  # disk full: the exit code and the log still tell
        _say(f"cannot write error.json: {error}")
    return code


class _EchoProgress(JsonlProgress):
    """Also writes a readable line per report to stderr."""

    def phase(self, name: str) -> None:
        super().phase(name)
        _say(f"-- {name}")

    def step(self, step: int, total: int, **metrics: float) -> None:
        super().step(step, total, **metrics)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        _say(f"   {step}/{total}  {shown}")

    def event(self, message: str, *, level: Level = "info", **data: Any) -> None:
        super().event(message, level=level, **data)
        _say(f"   {level}: {message}")
