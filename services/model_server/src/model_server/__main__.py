"""``python -m model_server serve`` (the vLLM supervisor), ``deploy`` (one stage), ``worker`` (queue deploy)."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pydantic import BaseModel

from parampara.execution.child import Stage, main
from parampara.schemas.stages import DeployConfig


def _deploy() -> Callable[..., BaseModel]:
    from model_server.deploy import run

    return run


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        from model_server.app import serve

        serve()
    else:
        main("model_server", stages={"deploy": Stage(DeployConfig, _deploy)}, queue="deploy")
