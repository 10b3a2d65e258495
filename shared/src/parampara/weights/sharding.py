"""How the tensors of a model directory are spread over files.

Hugging Face's layout: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with ``model.safetensors.index.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

from parampara.weights.model_files import INDEX
from parampara.weights.tensor_files import Planned

Groups = dict[str, list[Planned]]
"""Tensors of the new model by the tensor of the old one that they are made from."""


def shards(groups: Groups, limit: int) -> dict[str, Groups]:
    """File name to what it holds, in the order given. A group stays together; one of more than ``limit`` bytes has a file of its own."""
    files: list[Groups] = [{}]
    size = 0
    for source, tensors in groups.items():
        added = sum(tensor.bytes for tensor in tensors)
        if files[-1] and size + added > limit:
            files.append({})
            size = 0
        files[-1][source] = tensors
        size += added
    if len(files) == 1:
        return {"model.safetensors": files[0]}
    return {f"model-{number:05d}-of-{len(files):05d}.safetensors": held for number, held in enumerate(files, start=1)}


def write_index(directory: Path, files: dict[str, Groups]) -> None:
    """The index that belongs to :func:`shards`; a single file needs none."""
    if len(files) > 1:
        home = {tensor: name for name, groups in files.items() for group in groups.values() for tensor in group}
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensor in home)},
            "weight_map": {tensor.name: name for tensor, name in home.items()},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
