"""Two random LoRA adapters on a bench's model, trained, so it is recorded, one after the other; and PEFT's merge of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama import shapes

RANK, ALPHA, ADAPTERS = 16, 32, 2


def make_adapters(base: Path, directory: Path, config: dict[str, int], *, seed: int) -> list[Path]:
    """``directory / "adapter0"`` and so on, for every projection of ``base``, a model of :func:`llama.make_model` with ``config``."""
    import torch
    from safetensors.torch import save_file

    from parampara.manifest import sha256_file, weights_fingerprint

    made = adapters_of(directory)
    base_sha256, before = weights_fingerprint(base), []
    generator = torch.Generator().manual_seed(seed + 1)
    for adapter in made:
        adapter.mkdir()
        tensors = {}
        for name, shape in shapes(config).items():
            if "_proj" in name:
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * shape[1] ** -0.5
                tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.01
        save_file(tensors, str(adapter / "adapter_model.safetensors"))
        modules = sorted({name.split(".")[-2] for name in shapes(config) if "_proj" in name})
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "task_type": "CAUSAL_LM"}
        (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
        record = {"base_sha256": base_sha256, "lineage": {"base_sha256": base_sha256, "adapters": before.copy()}}
        (adapter / "training.json").write_text(json.dumps(record), encoding="utf-8")
        before.append(sha256_file(adapter / "adapter_model.safetensors"))
    return made


def adapters_of(directory: Path) -> list[Path]:
    return [directory / f"adapter{position}" for position in range(ADAPTERS)]


def factors_of(adapters: Sequence[Path], name: str) -> tuple[Any, Any] | None:
    """``left`` [rows, r] and ``right`` [r, columns], float64, whose product all adapters add to the base's tensor ``name``."""
    import torch
    from safetensors import safe_open

    stem, lefts, rights = f"base_model.model.{name.removesuffix('.weight')}", [], []
    for adapter in adapters:
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as tensors:
            if f"{stem}.lora_A.weight" in tensors.keys():  # noqa: SIM118 - it is no mapping
                rights.append(tensors.get_tensor(f"{stem}.lora_A.weight").double())
                lefts.append(tensors.get_tensor(f"{stem}.lora_B.weight").double() * (ALPHA / RANK))
    return (torch.cat(lefts, 1), torch.cat(rights, 0)) if lefts else None


def merge_in_double(weights: Mapping[str, Any], adapters: Sequence[Path]) -> dict[str, Any]:
    """The merge of a small model's tensors in float64."""
    merged = {name: tensor.double() for name, tensor in weights.items()}
    for name in merged:
        if (factors := factors_of(adapters, name)) is not None:
            merged[name] += factors[0] @ factors[1]
    return merged


def merge_with_peft(base: Path, adapters: Sequence[Path], output: Path, *, dtype: str = "auto") -> None:
    """PEFT's ``merge_and_unload``, adapter after adapter, saved and synced; ``auto`` merges in the base's own type."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    model.save_pretrained(str(output))
    for path in output.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
