"""The two ways to build the trainer of a run: Unsloth where it runs, plain TRL with PEFT otherwise.

A process trains with one of them: importing Unsloth rebinds parts of transformers, PEFT and TRL for good, and it has to
come before them. That is why nothing in this package imports those libraries at the top of a module.
"""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from parampara.errors import InvalidRequest
from parampara.schemas.stages import LoraParams

Name = Literal["unsloth", "trl"]


@dataclass(frozen=True)
class LoadRequest:
    model: Path
    lora: LoraParams | None
    """None: every weight is trained."""
    dtype: Any
    """A ``torch.dtype``."""
    max_seq_length: int
    gradient_checkpointing: bool
    load_in_4bit: bool
    seed: int
    sharded: bool = False
    """It is sharded layer by layer afterwards (:mod:`trainer.sharding`) and stays in the machine's memory until then."""


class Backend(Protocol):
    """What a backend module offers."""

    def load(self, request: LoadRequest) -> Any:
        """The base model with a fresh LoRA adapter (a ``PeftModel``), weights frozen but the adapter's; without ``lora`` all trained."""
        ...

    def trainer_base(self) -> type:
        """The SFTTrainer class to build on."""
        ...


@dataclass(frozen=True)
class Choice:
    """Which backend runs, and why it and not the other."""

    name: Name
    reason: str
    module: Any


def choose(wanted: Literal["auto", "unsloth", "trl"], *, cache: Path, full: bool = False, processes: int = 1) -> Choice:
    """Take the wanted backend; ``auto`` takes Unsloth where it can be imported and trains an adapter alone, and plain TRL where not.

    ``cache`` is where Unsloth may write the code that it generates. ``full``: every weight is trained, which Unsloth does by other code
    on a GPU (weights in bfloat16, models compiled anew) than on a CPU, so that no test here would speak for it: plain TRL does it.
    :func:`trainer.ranks.processes` lets Unsloth train in one process alone.

    Raises:
        InvalidRequest: Unsloth was asked for by name and can not run here, or not train every weight.
    """
    if full and wanted == "unsloth":
        raise InvalidRequest(
            "backend is unsloth and lora is null: every weight is trained by plain TRL alone. Set backend to auto or trl, or give lora.",
            param="backend",
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if wanted == "trl":
        return Choice("trl", "asked for by the setting backend", _module("trl"))
    if full:
        return Choice("trl", "backend is auto and lora is null: every weight is trained by plain TRL alone", _module("trl"))
    if wanted == "auto" and processes > 1:
        return Choice("trl", f"backend is auto and Unsloth trains on one GPU, not in {processes} processes", _module("trl"))
    fault = _start_unsloth(cache)
    if fault is None:
        why = "asked for by the setting backend" if wanted == "unsloth" else "backend is auto and Unsloth runs on this machine"
        return Choice("unsloth", why, _module("unsloth"))
    if wanted == "unsloth":
        raise InvalidRequest(f"backend is unsloth, which can not run here ({fault}); use auto or trl.", param="backend")
    return Choice("trl", f"backend is auto and Unsloth can not run here ({fault})", _module("trl"))


def _module(name: Name) -> Backend:
    return importlib.import_module(f"trainer.backends.{name}")  # type: ignore[return-value]


def _has_c_compiler() -> bool:
    """Looked for as Triton looks (triton.runtime.build): ``CC``, else gcc or clang."""
    wanted = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    return any(shutil.which(name) for name in wanted)


def _start_unsloth(cache: Path) -> str | None:
    """Import Unsloth, confined: generated code below ``cache``, no compiler, no statistics. Return why it failed, or None."""
    import torch

    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(cache)
    os.environ["UNSLOTH_DISABLE_STATISTICS"] = "1"
    if not torch.cuda.is_available():
        os.environ["UNSLOTH_COMPILE_DISABLE"] = "1"  # torch.compile on a CPU wants a C++ compiler, which users need not have
    elif not _has_c_compiler():
        return "no C compiler, which Triton needs for its kernels"  # it would crash at the first of them, with the model loaded
    try:
        importlib.import_module("unsloth")
    except (ImportError, NotImplementedError, RuntimeError, OSError, AttributeError, AssertionError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else 'no message'}"
    return None
