"""One running vLLM: started under the guard in its own process group, stopped whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import BinaryIO

from model_server.failure import log_tail
from parampara.errors import Unavailable

STOP_SECONDS = 45.0
"""From SIGTERM (vLLM lets running requests finish) to SIGKILL of the whole group."""
_KEEP_LOG_BYTES = 32 * 1024 * 1024


class Engine:
    """A vLLM process tree. Made by :meth:`start`."""

    def __init__(self, process: asyncio.subprocess.Process, *, log: Path, log_start: int) -> None:
        self._process = process
        self._log = log
        self._log_start = log_start
        self.started_at = time.monotonic()

    @classmethod
    async def start(cls, command: list[str], environment: dict[str, str], *, log: Path) -> Engine:
        """Launch ``command`` with its output appended to ``log``.

        Raises:
            OSError: the log cannot be written or the interpreter cannot be started.
        """
        with open_log(log) as sink:
            sink.write(f"\n==== {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
            sink.flush()
            start = sink.tell()
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "model_server.guard",
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=sink,
                stderr=sink,
                env=environment,
                start_new_session=True,
            )
        return cls(process, log=log, log_start=start)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def exit_code(self) -> int | None:
        return self._process.returncode

    def log_tail(self) -> str:
        """The last lines that this process wrote."""
        return log_tail(self._log, start=self._log_start)

    async def wait(self) -> int:
        return await self._process.wait()

    async def stop(self, *, grace: float = STOP_SECONDS) -> None:
        """Let running requests finish, then make sure that nothing of the group is left."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), grace)
        self.sweep()
        await self._process.wait()

    def sweep(self) -> None:
        """Kill whatever is left in the process group (vLLM's engine survives its parent)."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)


def open_log(path: Path) -> BinaryIO:
    """Open for appending; a file that grew too large is put aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _KEEP_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def require_free_port(host: str, port: int) -> None:
    """Refuse a port that somebody else holds, before vLLM spends half a minute to find out.

    Raises:
        Unavailable: names the port and its setting.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise Unavailable(
                f"vLLM's port {host}:{port} cannot be had ({error.strerror}); set PARAMPARA_MODEL_SERVER__VLLM_PORT to a free one.",
                code="port_taken",
            ) from None
