"""LoRA adapters as deltas: read from PEFT's files, refused by name where the merge would not be exact."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parampara.errors import InvalidData
from parampara.manifest import sha256_file
from parampara.weights.tensor_files import TensorFile, TensorInfo

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# settings of peft.LoraConfig under which W + scale * B A is not the whole change, and what each is called
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "biases on LoRA layers (lora_bias)",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "rank_pattern": "ranks per module (rank_pattern)",
    "alpha_pattern": "scales per module (alpha_pattern)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "kasa_config": "KaSA (kasa_config)",
    "velora_config": "VeLoRA (velora_config)",
}
# ways of starting an adapter that change the base's own weights
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")


@dataclass(frozen=True)
class Provenance:
    """What the trainer recorded: the weights trained on, and how those came to be."""

    base_sha256: str
    line_base: str
    line_adapters: list[str]


class Adapter:
    """One LoRA adapter, opened; its factors are read tensor by tensor."""

    def __init__(self, directory: Path, position: int) -> None:
        self.name = f"adapters[{position}]"
        config = _read_json(directory / "adapter_config.json", self.name)
        _refuse_unsupported(config, self.name)
        self.provenance = _provenance(directory, self.name)
        weights = directory / "adapter_model.safetensors"
        if not weights.is_file():
            raise InvalidData(f"{self.name}: adapter_model.safetensors is missing in {directory}.", param=self.name)
        self.sha256 = sha256_file(weights)
        self.r = int(config["r"])
        # LoraLayer.scaling in PEFT: alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732)
        self.scale = float(config["lora_alpha"]) / (math.sqrt(self.r) if config.get("use_rslora") else self.r)
        self._file = TensorFile(weights)
        self.targets = _targets(self._file, self.name)

    def check_against(self, base: dict[str, TensorInfo], *, tied: bool) -> None:
        """Every factor must fit a weight of the base.

        Raises:
            InvalidData: names the module that is missing, tied, or of another shape.
        """
        for target, module in self.targets.items():
            if "embed" in module or module.rpartition(".")[2] == "lm_head":
                shared = " The base ties it to the embedding, so both would have to change." if tied else ""
                raise InvalidData(f"{self.name}: LoRA on {module} is not supported.{shared}", param=self.name)
            if target not in base:
                raise InvalidData(
                    f"{self.name}: the base has no weight {target}; the adapter is for another architecture.", param=self.name
                )
            a, b = (self._file.tensors[_PREFIX + module + factor] for factor in _FACTORS)
            rows, columns = base[target].shape if len(base[target].shape) == 2 else (-1, -1)
            if (a.shape, b.shape) != ((self.r, columns), (rows, self.r)):
                raise InvalidData(
                    f"{self.name}: {module} has factors {a.shape}, {b.shape}; {(self.r, columns)}, {(rows, self.r)} would fit the base.",
                    param=self.name,
                )

    def factors(self, target: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """``(scale * B, A)`` in float32, shapes ``[out, r]`` and ``[r, in]``; None where the adapter leaves the weight alone."""
        if target not in self.targets:
            return None
        a, b = (self._file.read(_PREFIX + self.targets[target] + factor).float() for factor in _FACTORS)
        return b * self.scale, a

    def close(self) -> None:
        self._file.close()


def check_lineage(adapters: list[Adapter], base_sha256: str) -> None:
    """Each adapter must have been trained on exactly the weights that the base and the adapters before it make.

    The first was trained on the base itself. A later one was trained on a merged model, whose ``merge.json`` named the base
    and the adapters in it; the trainer copied that line into the adapter's ``training.json``.

    Raises:
        InvalidData: names the adapter and what it was trained on.
    """
    for position, adapter in enumerate(adapters):
        made_on, before = adapter.provenance, [earlier.sha256 for earlier in adapters[:position]]
        if position == 0 and made_on.base_sha256 != base_sha256:
            raise InvalidData(
                f"{adapter.name} was trained on weights {made_on.base_sha256[:16]}..., the base given here is {base_sha256[:16]}...: "
                "merging would make a model that nobody trained. Give the base it was trained on.",
                param=adapter.name,
            )
        if position and (made_on.line_base, made_on.line_adapters) != (base_sha256, before):
            raise InvalidData(
                f"{adapter.name} was trained on base {made_on.line_base[:16]}... with adapters {_short(made_on.line_adapters)}, "
                f"here it would follow base {base_sha256[:16]}... with {_short(before)}. Give the same base and order.",
                param=adapter.name,
            )


def _short(digests: list[str]) -> list[str]:
    return [digest[:16] for digest in digests]


def _refuse_unsupported(config: dict[str, Any], name: str) -> None:
    if config.get("peft_type") != "LORA":
        raise InvalidData(f"{name}: peft_type {config.get('peft_type')!r} is not supported; only LORA is.", param=name)
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int if key == "r" else int | float) or value <= 0:
            raise InvalidData(f"{name}: {key} is {value!r} in adapter_config.json; it has to be a number above zero.", param=name)
    for key, called in _UNSUPPORTED.items():
        if config.get(key):
            raise InvalidData(f"{name}: {called} is not supported by the merge.", param=name)
    if config.get("bias", "none") != "none":
        raise InvalidData(f"{name}: trained biases (bias={config['bias']!r}) are not supported by the merge.", param=name)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_STARTS):
        raise InvalidData(f"{name}: init_lora_weights={start!r} changes the base's weights and is not supported by the merge.", param=name)


def _targets(file: TensorFile, name: str) -> dict[str, str]:
    """Base weight name to module name, for every module that has both factors and nothing else."""
    modules: dict[str, int] = {}
    for key in file.tensors:
        factor = next((factor for factor in _FACTORS if key.endswith(factor)), None)
        if not key.startswith(_PREFIX) or factor is None:
            raise InvalidData(f"{name}: tensor {key} is not a plain LoRA factor; the merge does not support it.", param=name)
        module = key[len(_PREFIX) : -len(factor)]
        modules[module] = modules.get(module, 0) + 1
    if not modules:
        raise InvalidData(f"{name}: the adapter holds no tensors.", param=name)
    for module, factors in modules.items():
        if factors != len(_FACTORS):
            raise InvalidData(f"{name}: {module} lacks one of its two LoRA factors.", param=name)
    return {f"{module}.weight": module for module in modules}


def _provenance(directory: Path, name: str) -> Provenance:
    record = _read_json(directory / "training.json", name)
    try:
        lineage = record["lineage"]
        return Provenance(str(record["base_sha256"]), str(lineage["base_sha256"]), [str(sha) for sha in lineage["adapters"]])
    except (KeyError, TypeError) as error:
        raise InvalidData(f"{name}: training.json does not say what it was trained on ({error} is missing).", param=name) from None


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{name}: {path.name} can not be read ({error}).", param=name) from None
    if not isinstance(data, dict):
        raise InvalidData(f"{name}: {path.name} is not a JSON object.", param=name)
    return data
