"""Writing safetensors so that a full disk is what it is everywhere else: an ``OSError`` with its number."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """``safetensors.torch.save_file`` in the format of PyTorch.

    Raises:
        OSError: the disk is full and the like; the library itself tells that in the text of an error of its own class.
    """
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error
