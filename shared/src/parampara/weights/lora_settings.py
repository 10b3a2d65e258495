"""What ``adapter_config.json`` says, and what of it the merge refuses by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from parampara.errors import InvalidData

# settings of peft.LoraConfig under which the change is not one that this merge makes, and what each is called
_UNSUPPORTED = {
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "kasa_config": "KaSA (kasa_config)",
    "velora_config": "VeLoRA (velora_config)",
    "megatron_config": "Megatron's parallel layers (megatron_config)",
}
# ways of starting an adapter that change the base's own weights
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class LoraSettings:
    """The part of peft.LoraConfig that a merge needs; ``name`` is what errors call the adapter."""

    name: str
    r: int
    alpha: float
    rank_stabilized: bool
    dora: bool
    fan_in_fan_out: bool
    rank_pattern: Mapping[str, Any]
    alpha_pattern: Mapping[str, Any]
    token_indices: list[int] | Mapping[str, list[int]]

    def rank(self, module: str) -> int:
        """Rank of ``module`` (its name in the base): ``rank_pattern`` where it matches, ``r`` elsewhere."""
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """``LoraLayer.scaling`` in PEFT: alpha / r, or alpha / sqrt(r) with rank stabilisation (arXiv 2312.03732)."""
        alpha, rank = float(_by_pattern(self.alpha_pattern, module, self.alpha)), self.rank(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def tokens_of(self, module: str) -> list[int]:
        """Rows of embedding ``module`` that were trained alone (``trainable_token_indices``); empty where none were."""
        if isinstance(self.token_indices, list):
            return self.token_indices
        return next((rows for key, rows in self.token_indices.items() if module == key or module.endswith(f".{key}")), [])


def read_settings(config: Mapping[str, Any], name: str) -> LoraSettings:
    """Check ``adapter_config.json``.

    Raises:
        InvalidData: names the setting that is wrong, or under which the merge would not be what PEFT's is.
    """
    if config.get("peft_type") != "LORA":
        raise InvalidData(f"{name}: peft_type {config.get('peft_type')!r} is not supported; only LORA is.", param=name)
    for key, called in _UNSUPPORTED.items():
        if config.get(key):
            raise InvalidData(f"{name}: {called} is not supported by the merge.", param=name)
    if config.get("bias", "none") not in _BIASES:
        raise InvalidData(f"{name}: bias is {config['bias']!r} in adapter_config.json; it has to be one of {_BIASES}.", param=name)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING_STARTS):
        raise InvalidData(f"{name}: init_lora_weights={start!r} changes the base's weights and is not supported by the merge.", param=name)
    return LoraSettings(
        name=name,
        r=int(_positive(config.get("r"), f"{name}: r", name, whole=True)),
        alpha=float(_positive(config.get("lora_alpha"), f"{name}: lora_alpha", name)),
        rank_stabilized=bool(config.get("use_rslora")),
        dora=bool(config.get("use_dora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        rank_pattern=_pattern(config.get("rank_pattern"), "rank_pattern", name, whole=True),
        alpha_pattern=_pattern(config.get("alpha_pattern"), "alpha_pattern", name),
        token_indices=_token_indices(config.get("trainable_token_indices"), name),
    )


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """The first pattern that matches the end of the module's name: peft.utils.other.get_pattern_key."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _pattern(value: Any, key: str, name: str, *, whole: bool = False) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise InvalidData(f"{name}: {key} is {value!r} in adapter_config.json; it has to be an object.", param=name)
    for pattern, number in (value or {}).items():
        _positive(number, f"{name}: {key}[{pattern!r}]", name, whole=whole)
        try:
            re.compile(pattern)
        except re.error as error:
            raise InvalidData(f"{name}: {key}: {pattern!r} is no regular expression ({error}).", param=name) from None
    return value or {}


def _positive(value: Any, called: str, name: str, *, whole: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < math.inf:
        raise InvalidData(f"{called} is {value!r} in adapter_config.json; it has to be a number above zero.", param=name)
    return value


def _token_indices(value: Any, name: str) -> list[int] | dict[str, list[int]]:
    lists = list(value.values()) if isinstance(value, dict) else [value or []]
    for rows in lists:
        if not isinstance(rows, list) or not all(type(row) is int and row >= 0 for row in rows) or len(set(rows)) != len(rows):
            raise InvalidData(f"{name}: trainable_token_indices has to list each row once, and holds {str(rows)[:80]}.", param=name)
    return value or []
