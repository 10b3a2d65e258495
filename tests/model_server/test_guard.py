"""Nothing that the guard runs outlives whoever asked for it, however that one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

# a command whose child ignores SIGTERM and would live on, as vLLM's engine does
STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""
ASKER = """
import subprocess, sys, time
command = [sys.executable, "-m", "model_server.guard", sys.executable, "-c", sys.argv[1]]
p = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def gone(pid: int, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_killed_supervisor_leaves_nothing_behind() -> None:
    asker = subprocess.Popen([sys.executable, "-c", ASKER, STUBBORN], stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    grandchild = int(asker.stdout.readline())
    assert psutil.pid_exists(grandchild)
    asker.kill()
    asker.wait()
    assert gone(grandchild)


def test_sigterm_is_passed_on_and_the_exit_code_comes_back(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    guard = subprocess.Popen(
        [sys.executable, "-m", "model_server.guard", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert guard.stdout is not None
    assert guard.stdout.readline() == b"up\n"
    guard.send_signal(signal.SIGTERM)
    assert guard.wait(20) == 7


def test_the_guard_refuses_to_share_a_process_group() -> None:
    done = subprocess.run([sys.executable, "-m", "model_server.guard", "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"process group" in done.stderr
    assert os.getpgrp() != 0
