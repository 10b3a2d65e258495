"""A W8A8 checkpoint in the compressed-tensors format, as Unsloth's export has llm-compressor write it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "int-quantized",
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
        }
    },
}


def compress(model: Path, output: Path, *, largest: int = 127) -> Path:
    """Round every projection of ``model`` to int8, one scale per output row; the rest of the directory stays as it is.

    ``largest`` below 127 uses fewer of the eight bits: a coarser model in the same format.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, output)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = tensor
            continue
        scale = tensor.float().abs().amax(1, keepdim=True) / largest
        tensors[name] = (tensor.float() / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale.to(tensor.dtype)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (output / "config.json").write_text(json.dumps({**config, "quantization_config": SCHEME}), encoding="utf-8")
    return output
