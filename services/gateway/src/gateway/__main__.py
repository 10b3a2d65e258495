"""``python -m gateway serve``: the public base URL on the port of ``PARAMPARA_GATEWAY__PORT``."""

from __future__ import annotations

import argparse

import uvicorn

from gateway.app import Gateway
from parampara.http import exit_zero_on_sigterm
from parampara.settings import get_settings
from parampara.telemetry import configure_logging

GRACE_SECONDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gateway", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="serve until SIGTERM")
    parser.parse_args()
    exit_zero_on_sigterm()
    settings = get_settings()
    configure_logging("gateway")
    uvicorn.run(
        Gateway(settings),
        host=settings.gateway.host,
        port=settings.gateway.port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
