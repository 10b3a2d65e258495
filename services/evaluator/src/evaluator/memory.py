"""What a model server will need: an estimate, before anything is deployed, of the memory of the card.

    (weights + cache of the sequences + activations + 1 GiB) / gpu_memory_utilization

Weights are the bytes on disk. A token's keys and values take 2 x layers x key-value heads x head size x bytes of the type (full
attention; a model with sliding windows needs less). Activations are those of one prefill step of 2,048 tokens, vLLM's default
below 70 GiB of card, and of the sampler's logits. The GiB is CUDA's context, the libraries and the captured graphs.
vLLM takes only the share ``gpu_memory_utilization`` of the card, so the card has to be that much larger.
"""

from __future__ import annotations

import json
from pathlib import Path

from parampara.schemas.stages import DeployParams

_FIXED = 1 << 30
_STEP_TOKENS = 2048
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def metrics(directory: Path, params: DeployParams) -> dict[str, float]:
    """``deploy.memory_bytes``: the smallest card that serves this model directory as ``params`` say, with ``max_num_seqs``
    sequences of full length at a time (one where it is null: what vLLM needs to start); ``deploy.kv_bytes_per_token``.

    Nothing for a config that does not describe an attention like Llama's.
    """
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = {**config, **config.get("text_config", {})}
    try:
        layers, heads, width = (int(config[key]) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
        positions, inner, vocabulary = (int(config[key]) for key in ("max_position_embeddings", "intermediate_size", "vocab_size"))
    except (KeyError, TypeError, ValueError):
        return {}
    stored = config.get("dtype") or config.get("torch_dtype") or "float16"
    size = _BYTES.get(stored if params.dtype == "auto" else params.dtype, 2)
    token = 2 * layers * int(config.get("num_key_value_heads") or heads) * int(config.get("head_dim") or width // heads) * size
    sequences = params.max_num_seqs or 1
    cache = token * (params.max_model_len or positions) * sequences
    activations = _STEP_TOKENS * (2 * inner + 4 * width) * size + sequences * vocabulary * 4 * 2
    needed = weight_bytes(directory) + cache + activations + _FIXED
    return {"deploy.memory_bytes": needed / params.gpu_memory_utilization, "deploy.kv_bytes_per_token": float(token)}


def weight_bytes(directory: Path) -> int:
    """Bytes of weights on disk: about what a model server holds in memory beside its cache."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))
