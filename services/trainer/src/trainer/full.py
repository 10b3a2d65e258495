"""Full fine-tuning (``lora: null``): every weight of the model is trained, in float32, and written under the base's own names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from parampara.errors import InvalidData, OutOfMemory
from parampara.progress import Progress
from parampara.schemas.stages import TrainParams
from parampara.weights import full
from parampara.weights.model_files import ModelFiles
from parampara.weights.tensor_files import Planned, ShardWriter
from trainer.divergence import require_finite
from trainer.precision import Hardware

USUAL_RATES = "1e-5 to 5e-5"
_HIGH_RATE = 1e-4
_WEIGHT_AND_GRADIENT = 8
"""Bytes per weight, both in float32."""
_STATE = {"adamw_torch": 8, "adamw_torch_fused": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}
"""Bytes per weight of Adam's two means, by ``optim``; a paged optimizer leaves a GPU for main memory."""


def check(model: Path, train: TrainParams, hardware: Hardware, progress: Progress) -> None:
    """What can be told before anything is loaded: memory that can not be enough, a learning rate that is one of adapters.

    Raises:
        InvalidData: ``model`` is not a model directory with safetensors.
        OutOfMemory: weights, gradients and optimizer alone are more than the device has in all.
    """
    if train.learning_rate > _HIGH_RATE:
        progress.event(
            f"learning_rate {train.learning_rate:g} is high for training every weight (usual: {USUAL_RATES}): watch the validation loss",
            level="warn",
        )
    state = 0 if hardware.optimizer.startswith("paged") and hardware.device.type == "cuda" else _STATE[hardware.optimizer]
    per_weight = _WEIGHT_AND_GRADIENT + state
    weights, room = _weights_of(model), _room(hardware.device)
    if weights * per_weight > room:
        raise OutOfMemory(
            f"Training all {weights / 1e9:.1f} billion weights takes {per_weight} bytes each (weight, gradient, {hardware.optimizer}), "
            f"{weights * per_weight / 1e9:.0f} GB before a single activation; the {hardware.device.type} here has {room / 1e9:.0f} GB. "
            "Give lora (an adapter instead of every weight)" + (" or take optim adamw_8bit." if state == 8 else "."),
            param="params.lora",
        )


def stored_as(model: Any, base: Path) -> dict[str, str | None]:
    """Each tensor that the base stores to the trained parameter that it holds; None where it holds none (tables that are not trained).

    A tied parameter has two names: the base stores it under one, or under both.

    Raises:
        InvalidData: a parameter has no place in the base: transformers makes another model of it than is stored.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = {name: names[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    files = ModelFiles(base)
    files.close()
    stored = {name: every.get(name) for name in files.tensors}
    if homeless := sorted(set(names.values()) - set(stored.values())):
        raise InvalidData(
            f"{base}: {homeless[0]} is trained and has no tensor of that name in the model's files ({len(homeless)} in all), so it could "
            "not be put back. Load the model with transformers and save it again, or train an adapter (params.lora).",
            param="params.lora",
        )
    return stored


def write(directory: Path, *, stored: Mapping[str, str | None], trained: Mapping[str, torch.Tensor], base: Path, base_sha256: str) -> None:
    """``model.safetensors`` with every tensor that ``base`` stores, trained ones in float32 as they are, and ``full_weights.json``.

    Raises:
        Diverged: a weight is not finite.
        OSError: the disk is full.
    """
    require_finite(trained)
    files = ModelFiles(base)
    try:
        planned = []
        for name, info in files.tensors.items():
            held = stored[name]
            dtype, shape = (info.dtype, info.shape) if held is None else (trained[held].dtype, tuple(trained[held].shape))
            planned.append(Planned(name, dtype, shape))
        with ShardWriter(directory / full.WEIGHTS, planned) as writer:
            for name in files.tensors:
                held = stored[name]
                writer.write(files.home[name].read(name) if held is None else trained[held])
    finally:
        files.close()
    full.describe(directory, base_sha256=base_sha256)


def _weights_of(model: Path) -> int:
    """How many weights the model's files hold; a tied head that is stored as well counts once."""
    files = ModelFiles(model)
    files.close()
    return sum(
        info.elements
        for name, info in files.tensors.items()
        if info.dtype.is_floating_point and not (files.tied and name == "lm_head.weight")
    )


def _room(device: torch.device) -> int:
    """Bytes of memory in all: of the GPU, or of this machine as far as its control group lets this process have it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        if path.is_file() and (limit := path.read_text(encoding="ascii").strip()).isdigit():
            memory = min(memory, int(limit))
    return memory
