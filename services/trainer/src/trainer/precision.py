"""Device, number format and optimizer of a run, by hardware and setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from parampara.errors import InvalidRequest
from parampara.schemas.stages import Dtype

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Hardware:
    device: torch.device
    dtype: Dtype
    optimizer: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.dtype]

    def autocast(self) -> torch.autocast:
        """The precision of a forward pass, as the trainer's own."""
        return torch.autocast(self.device.type, dtype=self.torch_dtype, enabled=self.dtype != "float32")


def choose_hardware(precision: Literal["auto", "float32", "float16", "bfloat16"], optimizer: str) -> Hardware:
    """``auto``: float32 on a CPU (bfloat16 is slower there), bfloat16 on a GPU that has it, else float16.

    Every optimizer runs on both: those of bitsandbytes have CPU kernels, and a paged one keeps its state in plain memory there.

    Raises:
        InvalidRequest: float16 on a CPU, whose kernels for it do not train.
    """
    gpu = torch.cuda.is_available()
    if precision == "auto":
        dtype: Dtype = ("bfloat16" if torch.cuda.is_bf16_supported() else "float16") if gpu else "float32"
    elif precision == "float16" and not gpu:
        raise InvalidRequest(
            "precision is float16, which a CPU can not train in; use auto, float32 or bfloat16.", param="params.train.precision"
        )
    else:
        dtype = precision
    return Hardware(torch.device("cuda" if gpu else "cpu"), dtype, optimizer)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated on the GPU, or the resident set of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
