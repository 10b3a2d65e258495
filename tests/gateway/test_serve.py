"""``python -m gateway serve`` as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx

from tests.conftest import free_port
from tests.gateway.servers import wait_until


def test_metrics_need_a_key_but_on_a_port_of_their_own(database_url: str, redis_url: str, tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    environment = {
        **os.environ,
        "PARAMPARA_HOME": str(tmp_path),
        "PARAMPARA_DATABASE__URL": database_url,
        "PARAMPARA_REDIS__URL": redis_url,
        "PARAMPARA_GATEWAY__PORT": str(port),
        "PARAMPARA_GATEWAY__METRICS_PORT": str(metrics_port),
    }
    with subprocess.Popen([sys.executable, "-m", "gateway", "serve"], env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or _answers(f"http://127.0.0.1:{port}/livez"))
            assert httpx.get(f"http://127.0.0.1:{port}/metrics").status_code == 401
            assert "parampara_gateway_requests_total" in httpx.get(f"http://127.0.0.1:{metrics_port}/metrics").text
            again = subprocess.run([sys.executable, "-m", "gateway", "serve"], env=environment, capture_output=True, text=True, check=False)
            assert again.returncode != 0
            assert "PARAMPARA_GATEWAY__METRICS_PORT" in again.stderr
            assert "Traceback" not in again.stderr
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
