"""Runs one command so that nothing of it outlives whoever asked for it.

vLLM is a tree of processes, and its engine survives a killed parent. The guard leads the process group, holds the read end
of a pipe (its stdin) whose write end only the supervisor has, and ends the whole group when that pipe closes - which the
kernel does even when the supervisor is killed with SIGKILL. SIGTERM is passed on to the command, so that it may drain.

Use: ``python -m model_server.guard COMMAND...`` with a pipe as stdin, as leader of its own session.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def main(command: list[str]) -> int:
    """Run ``command`` to its end and return its exit status (negative signal numbers become 128 + n)."""
    if os.getpgrp() != os.getpid():
        raise SystemExit("the guard has to lead its own process group")
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)
    signal.signal(signal.SIGTERM, lambda *_: child.poll() is None and child.send_signal(signal.SIGTERM))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    abandoned = False
    while child.poll() is None and not abandoned:
        readable, _, _ = select.select([0], [], [], 0.25)
        abandoned = bool(readable) and not os.read(0, 64)
    if abandoned:
        _end(child)
        os.killpg(0, signal.SIGKILL)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """Nobody waits for answers any more: a short grace, then the caller kills the group."""
    child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
