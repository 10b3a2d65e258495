"""How a deployment becomes a command line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from model_server.command import CPU_KV_BYTES, Wanted, build_command, build_environment, interpreter_of, log_configuration, quantization_of
from parampara.errors import InvalidData
from parampara.schemas.stages import DeployParams
from parampara.settings import ModelServerSettings

CONFIG = {
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "hidden_size": 128,
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def wanted(path: Path, **params: object) -> Wanted:
    return Wanted.model_validate(
        {
            "artifact_id": "sha256:a",
            "model_path": path,
            "model_name": "ft:tiny:org:kp:1",
            "alias": "kp",
            "generation": 1,
            "params": DeployParams(**params),
        }
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_cpu_command_has_the_smallest_start_and_the_checkpoints_own_quantization(model: Path) -> None:
    settings = ModelServerSettings(
        cpu=True, vllm_command=["python", "-m", "server", "--model"], vllm_port=9000, vllm_extra_args=["--extra"]
    )
    command = build_command(wanted(model), settings)
    assert command[:5] == ["python", "-m", "server", "--model", str(model)]
    assert option(command, "--served-model-name") == "ft:tiny:org:kp:1"
    assert option(command, "--port") == "9000"
    assert option(command, "--quantization") == "bitsandbytes"
    assert option(command, "--dtype") == "float16"
    assert option(command, "--max-model-len") == "512"
    assert option(command, "--kv-cache-memory-bytes") == str(CPU_KV_BYTES)
    assert "--enforce-eager" in command
    assert "--gpu-memory-utilization" not in command
    assert command[-1] == "--extra"


def test_kv_cache_grows_with_the_model_so_that_one_full_request_fits(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 32, "num_key_value_heads": 8, "head_dim": 128}))
    command = build_command(wanted(model, max_model_len=4096), ModelServerSettings(cpu=True))
    assert int(option(command, "--kv-cache-memory-bytes")) == 2 * 4096 * (2 * 32 * 8 * 128 * 2)


def test_gpu_command_passes_the_recipes_values(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": None}))
    command = build_command(wanted(model, max_model_len=8192, max_num_seqs=64, gpu_memory_utilization=0.8), ModelServerSettings(cpu=False))
    assert option(command, "--gpu-memory-utilization") == "0.8"
    assert option(command, "--max-model-len") == "8192"
    assert option(command, "--max-num-seqs") == "64"
    assert option(command, "--dtype") == "auto"
    assert "--quantization" not in command
    assert "--enforce-eager" not in command


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InvalidData, match=r"config\.json") as caught:
        build_command(wanted(tmp_path), ModelServerSettings())
    assert str(tmp_path) in caught.value.message


def test_vllm_gets_no_secret_of_the_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMPARA_DATABASE__URL", "postgresql://user:secret@host/db")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    environment = build_environment(ModelServerSettings(cpu=True), scratch=tmp_path, log_config=tmp_path / "log.json")
    assert not [key for key in environment if key.startswith("PARAMPARA_")]
    assert "VLLM_CPU_KVCACHE_SPACE" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["TORCHDYNAMO_DISABLE"] == "1"  # a request for log-probabilities would need a C++ compiler
    cores = [int(core) for core in environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")]
    assert set(cores) <= os.sched_getaffinity(0)


def test_interpreter_is_found_for_python_and_for_scripts(tmp_path: Path) -> None:
    script = tmp_path / "vllm"
    script.write_text(f"#!{sys.executable}\n")
    script.chmod(0o755)
    assert interpreter_of([sys.executable, "-m", "x"]) == Path(sys.executable)
    assert interpreter_of([str(script), "serve"]) == Path(sys.executable)
    assert interpreter_of(["no-such-command-anywhere"]) is None


def test_log_configuration_silences_the_line_per_matrix_product() -> None:
    assert log_configuration()["loggers"]["bitsandbytes"]["level"] == "ERROR"
    assert quantization_of({}) is None
