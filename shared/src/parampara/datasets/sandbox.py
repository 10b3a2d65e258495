"""Parses one untrusted document in a child process that can cost at most a fixed amount of memory, time and output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from parampara.errors import InvalidData

MEMORY_BYTES = 512 * 1024 * 1024
CPU_SECONDS = 60
WALL_SECONDS = 90
MAX_OUTPUT_BYTES = 256 * 1024 * 1024


def parse_apart(path: Path, *, kind: str, name: str, until_text: bool = False) -> tuple[str, list[tuple[str, str]]]:
    """Parse a ``pdf`` or ``epub`` and return its title and ``(page label, text)`` pairs, text uncleaned.

    The file is opened here and handed down as standard input: the child itself may open nothing and knows no path.
    ``until_text``: stop after the first page that holds text.

    Raises:
        InvalidData: damaged, encrypted, or needs more memory, time or text than the limits allow.
    """
    command = [sys.executable, "-m", "parampara.datasets.parse_child", kind, "first" if until_text else "all"]
    # a scrubbed environment: the child needs no secret and no setting
    environment = {"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONDONTWRITEBYTECODE": "1"}
    with path.open("rb") as file:
        child = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, start_new_session=True, cwd="/"
        )
    output = _bounded_output(child)
    if child.returncode == 0:
        answer = json.loads(output)
        if "error" in answer:
            raise InvalidData(f"{name}: {answer['error']}", param=name)
        return answer["title"], [(page[0], page[1]) for page in answer["pages"]]
    if len(output) > MAX_OUTPUT_BYTES:
        raise InvalidData(f"{name}: more than {MAX_OUTPUT_BYTES} bytes of text; split it.", param=name)
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise InvalidData(f"{name}: took more than {CPU_SECONDS} s of processor time to parse; the file may be damaged.", param=name)
    raise InvalidData(f"{name}: the {kind.upper()} parser gave up within {MEMORY_BYTES >> 20} MiB; the file may be damaged.", param=name)


def _bounded_output(child: subprocess.Popen[bytes]) -> bytes:
    """Everything the child prints, up to one byte above the cap; the child is always gone afterwards."""
    assert child.stdout is not None
    timer = threading.Timer(WALL_SECONDS, child.kill)
    timer.start()
    try:
        output = child.stdout.read(MAX_OUTPUT_BYTES + 1)
        if len(output) > MAX_OUTPUT_BYTES:
            child.kill()
        child.wait()
        return output
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        child.stdout.close()
