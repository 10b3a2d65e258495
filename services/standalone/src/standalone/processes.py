"""Child processes of the stack: each in its own process group with its own log, tied to our life, restarted when it dies."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STABLE_SECONDS = 60.0
_LOG_BYTES = 32 * 1024 * 1024
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)

State = Literal["waiting", "starting", "ready", "restarting", "stopped"]


@dataclass(frozen=True)
class Spec:
    """What to run and how to tell that it is ready."""

    name: str
    command: list[str]
    ready: Callable[[], bool]
    """Cheap, never raises; asked about twice a second until it says yes."""
    environment: dict[str, str] = field(default_factory=dict)
    where: str = ""
    """Address to show."""
    port: int | None = None
    """TCP port that the process itself has to hold before ``ready`` counts: another stack may answer there."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 20.0
    user: str | None = None
    """Account to run under (only root can change it)."""


class Child:
    """One supervised process."""

    def __init__(self, spec: Spec, *, log: Path) -> None:
        self.spec = spec
        self.log = log
        self.log_start = 0
        self.state: State = "waiting"
        self.restarts = 0
        self.exit_code: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._start_again_at = 0.0
        self._failures = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started_at if self._started_at else 0.0

    def start(self) -> None:
        """Start the process. Call from the main thread: the kernel ends the child when the thread that made it ends."""
        if self.log.exists() and self.log.stat().st_size > _LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as sink:
            sink.write(f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S')} start of {self.spec.name}\n".encode())
            sink.flush()
            self.log_start = sink.tell()
            self._process = subprocess.Popen(
                self.spec.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.spec.environment},
                cwd=self.log.parent.parent,
                start_new_session=True,
                preexec_fn=_tie(self.spec.stop_signal),
                user=self.spec.user,
                group=None if self.spec.user is None else pwd.getpwnam(self.spec.user).pw_gid,
                extra_groups=None if self.spec.user is None else [],
            )
        self._started_at = time.monotonic()
        self.exit_code = None
        self.state = "starting"

    def tick(self) -> bool:
        """Look after the process once; True when its state changed."""
        before = self.state, self.restarts
        if self.state == "restarting":
            if time.monotonic() >= self._start_again_at:
                self.start()
        elif self._process is not None and self._process.poll() is not None:
            self._died()
        elif self.state == "starting" and self.spec.ready() and self._holds_port():
            self.state = "ready"
        elif self.state == "ready" and self.seconds > _STABLE_SECONDS:
            self._failures = 0
        return (self.state, self.restarts) != before

    def ask_to_stop(self) -> None:
        self.state = "stopped"
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(self.spec.stop_signal)

    def stop(self) -> None:
        """Wait for the end of a process that was asked to stop, then kill what is left of its group."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.spec.stop_seconds)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def tail(self, lines: int = 30) -> str:
        """The last lines that this start of the process wrote."""
        return tail(self.log, start=self.log_start, lines=lines)

    def _holds_port(self) -> bool:
        if self.spec.port is None or self._process is None:
            return True
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self._process.pid)
            return any(
                connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == self.spec.port
                for member in (process, *process.children(recursive=True))
                for connection in member.net_connections(kind="tcp")
            )
        return False

    def _died(self) -> None:
        assert self._process is not None
        self.exit_code = self._process.returncode
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._start_again_at = time.monotonic() + BACKOFF_SECONDS[min(self._failures, len(BACKOFF_SECONDS) - 1)]
        self._failures += 1
        self.restarts += 1
        self.state = "restarting"


def tail(path: Path, *, start: int = 0, lines: int = 30) -> str:
    """The last ``lines`` lines of a file after byte ``start``."""
    try:
        with path.open("rb") as file:
            file.seek(max(start, path.stat().st_size - 64 * 1024))
            return "\n".join(file.read().decode("utf-8", errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def end_leftovers(recorded: list[tuple[int, float]], *, seconds: float = 15) -> list[int]:
    """End processes of an earlier stack that was killed: ``(pid, creation time)`` has to match, so nobody else is hit.

    Returns the pids that were still there.
    """
    found = []
    for pid, created in recorded:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            if abs(process.create_time() - created) < 1.0:
                found.append(process)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=seconds)
    for process in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)
    return [process.pid for process in found]


def created_at(pid: int) -> float:
    """Creation time of a process in Unix seconds; 0 when it is gone."""
    try:
        return psutil.Process(pid).create_time()
    except psutil.Error:
        return 0.0


def _tie(stop_signal: signal.Signals) -> Callable[[], None] | None:
    """Have the kernel send ``stop_signal`` to the child when we die, however we die."""
    if sys.platform != "linux":
        return None
    parent = os.getpid()

    def tie() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, stop_signal, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return tie
