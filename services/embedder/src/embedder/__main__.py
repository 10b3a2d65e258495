"""``python -m embedder serve``: ``/v1/embeddings`` on the port of ``PARAMPARA_EMBEDDER__PORT``."""

from __future__ import annotations

import argparse
import sys

import uvicorn

from parampara.errors import ParamparaError
from parampara.http import exit_zero_on_sigterm
from parampara.settings import get_settings
from parampara.telemetry import configure_logging


def main() -> int:
    parser = argparse.ArgumentParser(prog="embedder", description="OpenAI-compatible embeddings over one small model.")
    parser.add_argument("command", choices=["serve"])
    parser.parse_args()
    exit_zero_on_sigterm()
    configure_logging("embedder")
    from embedder.app import create_app

    settings = get_settings()
    try:
        app = create_app(settings)
    except ParamparaError as error:
        print(f"embedder: {error.message}", file=sys.stderr)
        return error.exit_code
    uvicorn.run(app, host=settings.embedder.host, port=settings.embedder.port, access_log=False, log_config=None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
