"""``python -m merger merge --config FILE --workdir DIR`` runs the stage; ``python -m merger worker`` serves the queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parampara.execution.child import Stage, main
from parampara.schemas.stages import MergeConfig


def _merge() -> Callable[..., Any]:
    from merger.merge import run

    return run


if __name__ == "__main__":
    main("merger", stages={"merge": Stage(MergeConfig, _merge)}, queue="merge")
