"""``python -m embedder serve``: ``/v1/embeddings`` on the port of ``PARAMPARA_EMBEDDER__PORT``."""

from __future__ import annotations

import argparse

import uvicorn

from parampara.http import exit_zero_on_sigterm
from parampara.settings import get_settings
from parampara.telemetry import configure_logging


def main() -> None:
    parser = argparse.ArgumentParser(prog="embedder", description="OpenAI-compatible embeddings over one small model.")
    parser.add_argument("command", choices=["serve"])
    parser.parse_args()
    exit_zero_on_sigterm()
    configure_logging("embedder")
    from embedder.app import create_app

    settings = get_settings()
    uvicorn.run(create_app(settings), host=settings.embedder.host, port=settings.embedder.port, access_log=False, log_config=None)


if __name__ == "__main__":
    main()
