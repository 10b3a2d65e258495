"""Checkpoints of Llama's shapes with random weights: what a bench reads, made in the memory of a few chunks."""

from __future__ import annotations

import json
from pathlib import Path

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_SHARD_BYTES = 5_000_000_000
POOL = 1 << 26
"""Random numbers drawn; tensors are cut from them at other places, since drawing billions would take longer than a bench."""


def make_model(directory: Path, config: dict[str, int], *, seed: int = 0, deviation: float = 0.02) -> None:
    """Write normal weights in BF16, in files of at most 5 GB as they are published, and a config.json.

    ``config`` is ``LLAMA_8B`` or like it, with ``num_hidden_layers``.
    """
    import torch

    from parampara.weights.sharding import shards, write_index
    from parampara.weights.tensor_files import Planned, ShardWriter

    directory.mkdir(parents=True)
    full = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, "dtype": "bfloat16", **config}
    (directory / "config.json").write_text(json.dumps(full), encoding="utf-8")
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).mul_(deviation).bfloat16()
    files = shards({name: [Planned(name, torch.bfloat16, shape)] for name, shape in shapes(config).items()}, _SHARD_BYTES)
    offset = 0
    for name, groups in files.items():
        plan = [tensor for group in groups.values() for tensor in group]
        with ShardWriter(directory / name, plan) as writer:
            for tensor in plan:
                if len(tensor.shape) == 1:
                    writer.write(torch.ones(tensor.shape, dtype=torch.bfloat16))
                    continue
                left = tensor.bytes // 2
                while left:
                    take = min(left, POOL - offset)
                    writer.write(pool[offset : offset + take])
                    left, offset = left - take, (offset + take) % POOL
                offset = (offset + 7919) % POOL
    write_index(directory, files)


def shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, in the order of the published files."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shared = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    made: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        made |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden if name in "qo" else shared, hidden) for name in "qkvo"}
        made |= {f"{prefix}.mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        made[f"{prefix}.mlp.down_proj.weight"] = (hidden, wide)
        made |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {**made, "model.norm.weight": (hidden,), "lm_head.weight": (config["vocab_size"], hidden)}
