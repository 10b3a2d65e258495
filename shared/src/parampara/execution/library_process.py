"""A library that works in a process of its own, because its pins are not the platform's: run, watched, and ended with the stage."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_KEPT = re.compile(r"PATH|HOME|TMPDIR|LANG|LC_\w+|LD_LIBRARY_PATH|(OMP|MKL|CUDA|NVIDIA|TRITON|TORCH|TORCHINDUCTOR|XDG|HF)_\w+")
_SECRET = "HF_TOKEN"
POLL_SECONDS = 0.2
REPORT_SECONDS = 15.0
STOP_SECONDS = 5.0


def environment() -> dict[str, str]:
    """What of this process's environment such a library gets: paths, threads, devices and caches, no secrets."""
    return {key: value for key, value in os.environ.items() if _KEPT.fullmatch(key) and key != _SECRET}


def run(
    command: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str],
    log: Path,
    check: Callable[[], None],
    alive: Callable[[], None],
) -> int:
    """Exit code of ``command``; all that it prints goes to ``log``.

    ``check`` is called several times a second and ends the process by raising. ``alive`` is called every 15 s in which the log has
    grown: a stage that reports nothing for long is taken for stuck.
    """
    with log.open("wb") as file, subprocess.Popen(command, cwd=cwd, env=environment, stdout=file, stderr=file) as process:
        said, seen = time.monotonic(), 0
        try:
            while process.poll() is None:
                check()
                if time.monotonic() - said >= REPORT_SECONDS and log.stat().st_size > seen:
                    said, seen = time.monotonic(), log.stat().st_size
                    alive()
                time.sleep(POLL_SECONDS)
        finally:
            _end(process)
    return process.returncode


def last_lines(log: Path) -> str:
    """The end of what it printed, on one line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:])[-500:] or "it printed nothing"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
