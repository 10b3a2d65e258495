"""A library that quantizes in a process of its own: run, watched for a wish to stop, and ended with the stage."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from parampara.errors import Preempted
from parampara.execution import stop

_POLL_SECONDS = 0.2
_STOP_SECONDS = 5.0


def run(command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], log: Path) -> int:
    """Exit code of ``command``; all that it prints goes to ``log``.

    Raises:
        Preempted: asked to stop while it ran; it has ended.
    """
    with log.open("wb") as file, subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file) as process:
        try:
            while process.poll() is None:
                if stop.requested():
                    raise Preempted("Asked to stop during quantization; the next attempt starts this stage again.")
                time.sleep(_POLL_SECONDS)
        finally:
            _end(process)
    return process.returncode


def last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-500:] or "it printed nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
