"""``python -m trainer dapt|sft|dpo --config FILE --workdir DIR`` runs one stage; ``python -m trainer worker`` serves the queue."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from parampara.execution.child import Stage, main
from parampara.schemas.stages import DaptConfig, DpoConfig, SftConfig


def _dapt() -> Callable[..., Any]:
    from trainer.dapt import run

    return run


def _sft() -> Callable[..., Any]:
    from trainer.sft import run

    return run


def _dpo() -> Callable[..., Any]:
    from trainer.dpo import run

    return run


def _import_trl() -> None:
    """What a stage with plain TRL imports, to the last lazy name."""
    for name in ("datasets", "transformers", "trl", "peft", "transformers.models.llama.modeling_llama"):
        importlib.import_module(name)
    for name in ("trainer.backends.trl", "trainer.engine", "trainer.blocks", "trainer.chat", "trainer.dapt", "trainer.sft"):
        importlib.import_module(name)
    for module, attribute in (("transformers", "Trainer"), ("transformers", "AutoTokenizer"), ("trl", "SFTTrainer"), ("trl", "SFTConfig")):
        getattr(importlib.import_module(module), attribute)


def _import_unsloth() -> None:
    """Unsloth first, as it has to be; only where there is no GPU, for on one its import already works with it."""
    from trainer.backends import choose

    if any(Path("/dev").glob("nvidia[0-9]*")):
        raise RuntimeError("Unsloth touches the GPU when it is imported, and no fork could use it then")
    choose("unsloth", cache=Path(gettempdir()) / f"unsloth-{os.getpid()}")
    _import_trl()


def _preloadable(config: DaptConfig | SftConfig | DpoConfig) -> bool:
    """Unsloth has rebound the other libraries where it is there, and can not do so any more where they are."""
    from trainer.ranks import processes

    by_unsloth = config.backend != "trl" and config.params.lora is not None and processes(config)[0] == 1
    return by_unsloth == ("unsloth" in sys.modules)


if __name__ == "__main__":
    main(
        "trainer",
        stages={
            "dapt": Stage(DaptConfig, _dapt, _preloadable),
            "sft": Stage(SftConfig, _sft, _preloadable),
            "dpo": Stage(DpoConfig, _dpo, _preloadable),
        },
        queue="train",
        preloads={"trl": _import_trl, "unsloth": _import_unsloth},
    )
