"""A process that has imported what a service's stages need, and forks a stage process out of itself for each job.

Importing torch and what trains on it costs seconds of processor time, a fork milliseconds. The worker starts
``python -m <service> preload`` and talks to it over a socket pair, one JSON object a message::

    here:   {"ready": null} or {"ready": "why it can not serve"}       once, after the imports
    worker: {"kind": "sft", "config": "...", "workdir": "...", "log": "..."}
    here:   {"pid": 4711}, and when that has ended {"code": 0}; or {"refused": "why"}

Only imports happen here: no thread may live and no GPU be touched before the fork, else nothing is served and the worker
starts its stages as usual. A stage forked here has what one started by itself has: a session of its own, its log, no
settings or secrets in its environment, its exit code, and the kernel's parent-death signal (the end of the worker ends
this process, whose end ends the stage). Its memory is given back with its end.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from parampara.errors import ParamparaError
from parampara.execution.child import SUPERVISOR_PID, Stage, die_with_supervisor, read_config, run_stage, share_the_cores
from parampara.execution.process import StageProcess, stage_environment
from parampara.telemetry import get_logger

_MESSAGE_BYTES = 65_536
_ANSWER_SECONDS = 10.0
_STILL = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # torch counts GPUs without touching one
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pyarrow's allocator starts a thread when it is imported
    "OPENBLAS_NUM_THREADS": "1",  # so does NumPy's linear algebra, which stages hardly use
}
"""Environment in which imports start no thread and touch no GPU."""
_log = get_logger(__name__)


class Preloaded:
    """The worker's side of one such process. It dies with the thread that started it; ask for stages from one thread at a time."""

    def __init__(self, service: str, what: str) -> None:
        self._service, self._what = service, what
        self._popen: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._ready = False
        self.fault: str | None = None
        """Why it can not serve, once it has said so: it would say so again, and is not started any more."""

    def start(self) -> None:
        """Start it, unless it runs; returns long before its imports are done."""
        if self.fault is not None or (self._popen is not None and self._popen.poll() is None):
            return
        self.stop()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", self._service, "preload", "--what", self._what, "--channel", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[theirs.fileno()],
                env={**stage_environment(), **_STILL},
            )

    def launch(self, *, kind: str, config: Path, workdir: Path, log: Path) -> StageProcess | None:
        """A stage process; None where it can not come from here (yet, or at all): the caller starts one as usual."""
        if self._channel is None:
            return None
        try:
            if not self._ready:
                if (greeting := _receive(self._channel, 0)) is None:
                    return None  # still importing
                if (fault := greeting["ready"]) is not None:
                    self.fault = fault
                    _log.warning("stages are started without preloading", reason=fault)
                    self.stop()
                    return None
                self._ready = True
            _send(self._channel, kind=kind, config=str(config), workdir=str(workdir), log=str(log))
            answer = _receive(self._channel, _ANSWER_SECONDS)
            while answer is not None and "code" in answer:  # the end of an earlier stage, for which nobody waited
                answer = _receive(self._channel, _ANSWER_SECONDS)
        except OSError as error:
            answer = {"refused": f"the preloaded process has died ({error})"}
        if answer is None:  # whatever it does later, it must not start a second stage
            answer = {"refused": "the preloaded process does not answer"}
            self.stop()
        if "pid" not in answer:
            _log.info("the stage is started without preloading", reason=answer["refused"])
            return None
        return ForkedStage(int(answer["pid"]), log, self._channel)

    def stop(self) -> None:
        """End it, and with it a stage that it has forked."""
        if self._popen is not None:
            self._popen.kill()
            self._popen.wait()
        if self._channel is not None:
            self._channel.close()
        self._popen = self._channel = None
        self._ready = False


class ForkedStage(StageProcess):
    def __init__(self, pid: int, log: Path, channel: socket.socket) -> None:
        super().__init__(pid, log)
        self._channel = channel
        self._code: int | None = None

    def wait(self, seconds: float) -> int | None:
        if self._code is None:
            try:
                answer = _receive(self._channel, seconds)
            except OSError:  # the forking process has died, and the kernel has killed the stage with it
                self.kill()
                answer = {"code": -signal.SIGKILL}
            self._code = None if answer is None else int(answer["code"])
        return self._code


def serve(stages: Mapping[str, Stage], *, imports: Callable[[], None], channel: int) -> NoReturn:
    """``python -m <service> preload``: import, then fork stages until the worker is gone."""
    die_with_supervisor()
    share_the_cores()
    with socket.socket(fileno=channel) as connection:
        fault = _imported(imports)
        _send(connection, ready=fault)
        while fault is None:
            try:
                request = _receive(connection, None)
            except OSError:
                break  # the worker has closed its end
            if request is not None:
                _serve_one(connection, request, stages)
    os._exit(0)


def _imported(imports: Callable[[], None]) -> str | None:
    """Import; return why nothing may be forked afterwards, or None."""
    try:
        imports()
    except Exception as error:  # noqa: BLE001 - whatever a library does on import, stages can still be started as usual
        return f"{type(error).__name__}: {error}"
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        return f"{threads} threads live after the imports, and a fork would have one of them"
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "the imports have touched a GPU, which no fork can use then"
    gc.collect()
    gc.freeze()  # a collection in a stage would write to, and so copy, every page shared with this process
    return None


def _serve_one(connection: socket.socket, request: dict[str, Any], stages: Mapping[str, Stage]) -> None:
    stage, config = stages[request["kind"]], Path(request["config"])
    if (fault := _unsuited(stage, config)) is not None:
        _send(connection, refused=fault)
        return
    pid = os.fork()
    if pid == 0:
        _become_stage(connection, stage, config=config, workdir=Path(request["workdir"]), log=Path(request["log"]))
    _send(connection, pid=pid)
    end = os.pidfd_open(pid)
    try:
        ready, _, _ = select.select([end, connection], [], [])
    finally:
        os.close(end)
    if connection in ready:  # nothing is said while a stage runs: the worker is gone
        os._exit(0)  # and the stage with this process
    _, status = os.waitpid(pid, 0)
    _send(connection, code=os.waitstatus_to_exitcode(status))


def _unsuited(stage: Stage, config: Path) -> str | None:
    try:
        return None if stage.preloadable(read_config(stage.config, config)) else "its backend is not the one preloaded"
    except ParamparaError as error:  # the stage itself is to say it, where it is read
        return error.message


def _become_stage(connection: socket.socket, stage: Stage, *, config: Path, workdir: Path, log: Path) -> NoReturn:
    """In the fork: what ``subprocess`` does for a process of its own, then the stage."""
    code = 1
    try:
        os.setsid()
        connection.close()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ[SUPERVISOR_PID] = str(os.getppid())
        code = run_stage(stage, config=config, workdir=workdir)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _send(connection: socket.socket, **message: Any) -> None:
    connection.send(json.dumps(message).encode())


def _receive(connection: socket.socket, seconds: float | None) -> dict[str, Any] | None:
    """The next message, or None when there is none after ``seconds``.

    Raises:
        ConnectionResetError: the other side has closed.
    """
    if not select.select([connection], [], [], seconds)[0]:
        return None
    data = connection.recv(_MESSAGE_BYTES)
    if not data:
        raise ConnectionResetError("the other side has closed")
    return json.loads(data)
