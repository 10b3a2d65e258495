"""How fast a run is for its hardware, and what it has cost: model FLOPS utilisation, memory, money."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from parampara.schemas.stages import Machine
from trainer.precision import Hardware, peak_memory_bytes

# Tera-FLOPS of the matrix units in bf16 (fp16 where a card has no bf16), dense, sums in fp32, from the vendors' data sheets;
# the first that fits the device's name counts
_PEAKS = [
    (r"GB200", 2500),
    (r"B200", 2250),
    (r"H200|GH200", 989),
    (r"H100 PCIe", 756),
    (r"H100 NVL", 835),
    (r"H100", 989),
    (r"H20", 148),
    (r"A100|A800", 312),
    (r"A30", 165),
    (r"A40|A6000", 150),
    (r"A10", 125),
    (r"L40S", 362),
    (r"L40", 181),
    (r"L4", 121),
    (r"RTX 6000 Ada", 364),
    (r"RTX 5090", 210),
    (r"RTX 4090", 165),
    (r"RTX 3090 Ti", 80),
    (r"RTX 3090", 71),
    (r"V100", 125),
    (r"T4", 65),
]


def peak_flops(device_name: str) -> float | None:
    """FLOPS per second of a GPU in bf16 or fp16, by its name as PyTorch tells it; None for one that is not in the table."""
    return next((tera * 1e12 for pattern, tera in _PEAKS if re.search(rf"\b({pattern})\b", device_name)), None)


def flops_per_token(model: Any) -> int:
    """Floating-point operations of the model, not of the machine, that one token costs in a training step.

    ``6 N`` (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): 2 N forward, 2 N for the gradients of the inputs, 2 N for those of the
    weights. A frozen weight has no gradient of its own and counts 4 N. N counts the linear layers, head included, embeddings not. The term
    of attention is left out, and so is what gradient checkpointing computes twice: the figure errs on the low side.
    """
    total = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):  # those of bitsandbytes too, whose tensors are packed
            total += module.in_features * module.out_features * (6 if module.weight.requires_grad else 4)
    return total


@dataclass(frozen=True)
class Speedometer:
    """Turns tokens and seconds into what a reader asks for; what is not known is absent."""

    device: torch.device
    flops_per_token: int
    peak_flops: float | None
    price_per_hour: float | None

    @classmethod
    def of(cls, model: Any, *, hardware: Hardware, machine: Machine, processes: int = 1) -> Speedometer:
        """``machine`` has the last word; the table covers GPUs in 16 bits, and neither CPUs nor float32. The peak is that of all
        ``processes``."""
        peak = machine.peak_flops
        if peak is None and hardware.device.type == "cuda" and hardware.dtype != "float32":
            peak = peak_flops(torch.cuda.get_device_name())
        peak = None if peak is None else peak * processes
        return cls(hardware.device, flops_per_token(model), peak, machine.price_per_hour)

    def read(self, *, tokens_per_second: float, seconds: float) -> dict[str, float]:
        """``peak_memory_bytes``, ``mfu`` (fraction of the peak) and ``cost`` (of ``seconds``, in the price's currency)."""
        found = {"peak_memory_bytes": float(peak_memory_bytes(self.device))}
        if self.peak_flops is not None:
            found["mfu"] = tokens_per_second * self.flops_per_token / self.peak_flops
        if self.price_per_hour is not None:
            found["cost"] = seconds / 3600 * self.price_per_hour
        return found
