"""The estimate of a card's memory, against figures that were counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluator import memory
from parampara.schemas.stages import DeployParams

LLAMA_8B = {
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 131072, "vocab_size": 128256, "dtype": "bfloat16",
}  # fmt: skip


def served(directory: Path, params: DeployParams, *, weights: int, **changes: object) -> dict[str, float]:
    (directory / "config.json").write_text(json.dumps({**LLAMA_8B, **changes}))
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(weights)  # a hole: no bytes are written
    return memory.metrics(directory, params)


def test_the_seeds_model_fits_its_card(tmp_path: Path) -> None:
    told = served(tmp_path, DeployParams(max_model_len=2048, dtype="float16"), weights=9_080_000_000)
    assert told["deploy.kv_bytes_per_token"] == 131_072  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert 11e9 < told["deploy.memory_bytes"] < 13e9
    wide = served(tmp_path, DeployParams(max_model_len=2048, max_num_seqs=32, dtype="float16"), weights=9_080_000_000)
    assert wide["deploy.memory_bytes"] - told["deploy.memory_bytes"] == pytest.approx(31 * (2048 * 131_072 + 128_256 * 8) / 0.9)


def test_without_a_length_the_whole_window_counts_and_no_longer_fits(tmp_path: Path) -> None:
    assert served(tmp_path, DeployParams(), weights=9_080_000_000)["deploy.memory_bytes"] > 24e9


def test_sixteen_bits_do_not_fit_beside_a_cache(tmp_path: Path) -> None:
    params = DeployParams(max_model_len=2048, max_num_seqs=32)
    assert served(tmp_path, params, weights=16_060_000_000)["deploy.memory_bytes"] > 24e9


def test_the_caches_type_is_the_one_that_is_served(tmp_path: Path) -> None:
    assert served(tmp_path, DeployParams(dtype="float32"), weights=1)["deploy.kv_bytes_per_token"] == 262_144


def test_another_kind_of_model_is_not_estimated(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert memory.metrics(tmp_path, DeployParams()) == {}
