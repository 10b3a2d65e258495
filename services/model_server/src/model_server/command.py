"""How a deployment becomes a ``vllm serve`` command line and its environment."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from parampara.errors import InvalidData
from parampara.schemas.stages import DeployParams
from parampara.settings import ModelServerSettings

CPU_MODEL_LEN = 1024
CPU_MAX_SEQS = 8
CPU_KV_BYTES = 64 * 1024 * 1024
CPU_THREADS = 8
"""Most threads that vLLM's CPU build gets unless ``VLLM_CPU_OMP_THREADS_BIND`` says otherwise."""
SHUTDOWN_SECONDS = 30
"""How long running requests may finish when vLLM is told to stop."""


class Wanted(BaseModel):
    """One model that shall be served: the body of ``PUT /deployment``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    artifact_id: str
    model_path: Path
    model_name: str = Field(min_length=1, max_length=300)
    alias: str
    generation: int = Field(ge=0)
    trial: bool = False
    """Served, but not vouched for until ``POST /deployment/verdict`` accepts it: the model before stays the one to go back to."""
    params: DeployParams = DeployParams()

    def starts_like(self, other: Wanted) -> bool:
        """Whether vLLM is started the same way for both: they differ only in who asked, how long that one waits and how it judges."""
        asker: Any = {"alias": True, "generation": True, "trial": True, "params": {"alias", "ready_timeout_seconds", "replace", "live"}}
        return self.model_dump(exclude=asker) == other.model_dump(exclude=asker)


def build_command(wanted: Wanted, settings: ModelServerSettings) -> list[str]:
    """The whole argument vector for ``wanted``; the model path follows the configured command directly.

    Raises:
        InvalidData: ``model_path`` is not a model directory.
    """
    config = read_config(wanted.model_path)
    params = wanted.params
    quantization = params.quantization or quantization_of(config)
    dtype = "float16" if params.dtype == "auto" and quantization == "bitsandbytes" else params.dtype
    arguments = {
        "--served-model-name": wanted.model_name,
        "--host": settings.vllm_host,
        "--port": str(settings.vllm_port),
        "--dtype": dtype,
        "--shutdown-timeout": str(SHUTDOWN_SECONDS),
    }
    if quantization:
        arguments["--quantization"] = quantization
    if settings.cpu:
        length = params.max_model_len or min(CPU_MODEL_LEN, int(config.get("max_position_embeddings", CPU_MODEL_LEN)))
        arguments["--max-model-len"] = str(length)
        arguments["--max-num-seqs"] = str(params.max_num_seqs or CPU_MAX_SEQS)
        arguments["--kv-cache-memory-bytes"] = str(max(CPU_KV_BYTES, 2 * length * _kv_bytes_per_token(config)))
    else:
        arguments["--gpu-memory-utilization"] = str(params.gpu_memory_utilization)
        if params.max_model_len:
            arguments["--max-model-len"] = str(params.max_model_len)
        if params.max_num_seqs:
            arguments["--max-num-seqs"] = str(params.max_num_seqs)
    flat = [part for pair in arguments.items() for part in pair]
    # without a C++ compiler vLLM's CPU build runs eagerly only
    eager = ["--enforce-eager"] if settings.cpu else []
    return [*settings.vllm_command, str(wanted.model_path), *flat, *eager, *settings.vllm_extra_args]


def build_environment(settings: ModelServerSettings, *, scratch: Path, log_config: Path) -> dict[str, str]:
    """vLLM's environment: offline, no telemetry, and none of the platform's own settings (they hold secrets)."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PARAMPARA_")}
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override --kv-cache-memory-bytes
    environment.update(
        VLLM_NO_USAGE_STATS="1",
        VLLM_CACHE_ROOT=str(scratch / "cache"),
        VLLM_LOGGING_CONFIG_PATH=str(log_config),
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        PYTHONUNBUFFERED="1",
        TOKENIZERS_PARALLELISM="false",
    )
    if settings.cpu:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", _cores())
        # eager throughout: vLLM compiles how it counts log-probabilities even so, and without a C++ compiler the first request for them
        # would kill the engine
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
        environment.pop("OMP_NUM_THREADS", None)
    return environment


def log_configuration() -> dict[str, Any]:
    """vLLM's usual log lines; bitsandbytes' warning about every single matrix product is left out."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "vllm": {
                "class": "vllm.logging_utils.NewLineFormatter",
                "datefmt": "%m-%d %H:%M:%S",
                "format": "%(levelname)s %(asctime)s [%(filename)s:%(lineno)d] %(message)s",
            }
        },
        "handlers": {"vllm": {"class": "logging.StreamHandler", "formatter": "vllm", "stream": "ext://sys.stderr"}},
        "loggers": {
            "vllm": {"handlers": ["vllm"], "level": "INFO", "propagate": False},
            "bitsandbytes": {"handlers": ["vllm"], "level": "ERROR", "propagate": False},
        },
    }


def read_config(model_path: Path) -> dict[str, Any]:
    """A model directory's ``config.json``.

    Raises:
        InvalidData: missing, unreadable or not a JSON object.
    """
    path = model_path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidData(f"{model_path} is not a model directory: config.json cannot be read ({error}).", param="model_path") from None
    if not isinstance(config, dict):
        raise InvalidData(f"{path} holds no JSON object.", param="model_path")
    return config


def quantization_of(config: dict[str, Any]) -> str | None:
    """The quantization method that a checkpoint declares of itself."""
    declared = config.get("quantization_config")
    return declared.get("quant_method") if isinstance(declared, dict) else None


def interpreter_of(command: list[str]) -> Path | None:
    """The Python that runs ``command``: itself, or the one in the script's first line. None: cannot be told."""
    if not command or (found := shutil.which(command[0])) is None:
        return None
    if Path(found).name.startswith("python"):
        return Path(found)
    with Path(found).open("rb") as file:
        first = file.readline(512)
    if not first.startswith(b"#!"):
        return None
    path = Path(first[2:].decode(errors="replace").strip())
    return path if path.name.startswith("python") and path.exists() else None


def _kv_bytes_per_token(config: dict[str, Any]) -> int:
    """Keys and values of all layers in 16 bits."""
    heads = int(config.get("num_attention_heads", 1))
    head_dim = int(config.get("head_dim") or int(config.get("hidden_size", 64)) // max(heads, 1))
    return 2 * int(config.get("num_hidden_layers", 1)) * int(config.get("num_key_value_heads") or heads) * head_dim * 2


def _cores() -> str:
    """Cores this process may use, as vLLM's binding wants them. ``auto`` would leave one compute thread on two cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    return ",".join(str(core) for core in cores[:CPU_THREADS])
