"""``python -m control_plane serve``: the API and the reconciler in one process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from control_plane.server import serve
from parampara.errors import ParamparaError
from parampara.settings import get_settings


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m control_plane", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("serve", help="serve the API and run the reconciler until SIGTERM")
    command.add_argument("--host", help="address to listen on (PARAMPARA_CONTROL_PLANE__HOST)")
    command.add_argument("--port", type=int, help="port to listen on, 0 for any free one (PARAMPARA_CONTROL_PLANE__PORT)")
    command.add_argument("--no-migrate", action="store_true", help="expect the schema to be there instead of bringing it up to date")
    given = parser.parse_args(arguments)
    settings = get_settings()
    try:
        serve(
            settings,
            host=given.host or settings.control_plane.host,
            port=settings.control_plane.port if given.port is None else given.port,
            migrate_first=not given.no_migrate,
        )
    except ParamparaError as error:
        print(f"control_plane: {error.message}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
