"""``python -m trainer dapt|sft --config FILE --workdir DIR`` runs one stage; ``python -m trainer worker`` serves the queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parampara.execution.child import Stage, main
from parampara.schemas.stages import DaptConfig, SftConfig


def _dapt() -> Callable[..., Any]:
    from trainer.dapt import run

    return run


def _sft() -> Callable[..., Any]:
    from trainer.sft import run

    return run


if __name__ == "__main__":
    main("trainer", stages={"dapt": Stage(DaptConfig, _dapt), "sft": Stage(SftConfig, _sft)}, queue="train")
