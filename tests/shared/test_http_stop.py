"""A server that is told to stop exits with 0: after its last request, and also while it still loads."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time

import pytest

SERVER = """
import sys, time
import uvicorn
from fastapi import FastAPI
from parampara.http import exit_zero_on_sigterm

exit_zero_on_sigterm()
print("loading", flush=True)
time.sleep(float(sys.argv[2]))
app = FastAPI()

@app.get("/slow")
def slow():
    print("asked", flush=True)
    time.sleep(1)
    return "done"

uvicorn.run(app, port=int(sys.argv[1]), log_level="error")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


def start(port: int, *, loads_for: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SERVER, str(port), str(loads_for)], stdout=subprocess.PIPE, text=True)


def test_a_server_told_to_stop_answers_first_and_exits_with_zero(port: int) -> None:
    with start(port, loads_for=0) as server:
        try:
            request = subprocess.Popen([sys.executable, "-c", _CLIENT, str(port)], stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            assert server.stdout.readline() == "loading\n"
            assert server.stdout.readline() == "asked\n"
            server.send_signal(signal.SIGTERM)
            assert request.communicate(timeout=30)[0] == '"done"'
            assert server.wait(30) == 0
        finally:
            server.kill()


def test_a_server_that_still_loads_exits_at_once(port: int) -> None:
    with start(port, loads_for=60) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "loading\n"
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            assert server.wait(30) == 0
            assert time.monotonic() - began < 20
        finally:
            server.kill()


_CLIENT = """
import sys, time, urllib.error, urllib.request
for _ in range(300):
    try:
        print(urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/slow", timeout=20).read().decode(), end="")
        break
    except (urllib.error.URLError, ConnectionError):
        time.sleep(0.1)
"""
