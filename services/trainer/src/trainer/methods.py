"""How a base is adapted: from a recipe's settings to the objects of PEFT and bitsandbytes, equal for both backends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from parampara.errors import InvalidData
from parampara.schemas.training import AdapterParams, LoraParams
from trainer.precision import Hardware

_SHOWN = 12


def adapter_arguments(lora: LoraParams) -> dict[str, Any]:
    """Keyword arguments of ``peft.LoraConfig``."""
    return {**lora.model_dump(), "bias": "none"}


def four_bit_base(compute: torch.dtype) -> Any:
    """``BitsAndBytesConfig`` of QLoRA (Dettmers et al. 2023, arXiv 2305.14314): NF4, scales quantized too, products in ``compute``."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)


def trained_in(params: AdapterParams, hardware: Hardware) -> str:
    """Number format of the base's weights while training: ``nf4`` or the compute format, and ``float32`` where they change themselves."""
    if params.lora is None:
        return "float32"
    return "nf4" if params.train.load_in_4bit else hardware.dtype


def check_modules(model: Any, lora: LoraParams) -> None:
    """Each module that the settings name must be a linear layer of the base that can be merged later.

    PEFT itself passes over names that match nothing as long as one of them matches: part of the adapter would be missing silently.

    Raises:
        InvalidData: names the setting, the module and what the model has.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    adapted = [name for name in linear if any(_ends(name, target) for target in lora.target_modules)]
    _require("target_modules", lora.target_modules, linear, "linear layers that LoRA can adapt")
    _require("rank_pattern", lora.rank_pattern, adapted, "layers adapted here")
    _require("alpha_pattern", lora.alpha_pattern, adapted, "layers adapted here")
    _one_entry_each("rank_pattern", lora.rank_pattern, adapted)
    _one_entry_each("alpha_pattern", lora.alpha_pattern, adapted)


def adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The trained parameters' own tensors, by name; for :func:`restore_adapter`."""
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_adapter(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what :func:`adapter_parameters` took: TRL rounds the adapter of a 4-bit base to bfloat16, optimizer steps and all."""
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.data = tensors[name]


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _one_entry_each(setting: str, endings: Iterable[str], names: list[str]) -> None:
    """PEFT takes the first entry that fits; JSON and the database keep no order that this could rest on."""
    for name in names:
        if len(fits := [ending for ending in endings if _ends(name, ending)]) > 1:
            raise InvalidData(
                f"params.lora.{setting}: {name} ends in {fits[0]!r} and in {fits[1]!r}; keep one.", param=f"params.lora.{setting}"
            )


def _require(setting: str, endings: Iterable[str], names: list[str], called: str) -> None:
    for ending in endings:
        if not any(_ends(name, ending) for name in names):
            kinds = sorted({name.rpartition(".")[2] for name in names})
            shown = ", ".join(kinds[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more" if len(kinds) > _SHOWN else "")
            example = f", e.g. {names[0]}" if names else ""
            raise InvalidData(
                f"params.lora.{setting}: no module of the model ends in {ending!r}; its {called} are {shown or 'none'}{example}.",
                param=f"params.lora.{setting}",
            )
