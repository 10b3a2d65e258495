"""Why vLLM did not start, from what it logged."""

from __future__ import annotations

import re
from pathlib import Path

TAIL_LINES = 60
_TAIL_BYTES = 64 * 1024
_PREFIX = re.compile(r"^(\(\w+[^)]*\)\s*)?((ERROR|WARNING|INFO|CRITICAL)\s+\S+\s+\S+\s+\[[^\]]+\]\s*)?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?([A-Z]\w*(?:Error|Exception|Exit|Interrupt)): \S|^(api_server\.py|vllm.*): error: ")
_CONSEQUENCES = ("Engine core initialization failed", "Engine process failed to start", "EngineCore failed to start")
_ADVICE = {
    "Unknown quantization method: bitsandbytes": "install vllm-bnb-plugin and bitsandbytes into vLLM's environment",
    "address already in use": "set PARAMPARA_MODEL_SERVER__VLLM_PORT to a free port",
    "No available memory for the cache blocks": "lower max_model_len or raise gpu_memory_utilization in the recipe's deploy stage",
    "is larger than the available KV cache memory": "lower max_model_len in the recipe's deploy stage",
    "out of memory": "lower max_model_len or gpu_memory_utilization in the recipe's deploy stage",
}


def log_tail(path: Path, *, start: int = 0, lines: int = TAIL_LINES) -> str:
    """The last ``lines`` lines that ``path`` holds after byte ``start``."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(start, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def reason(log: str) -> str:
    """The exception that began it: the last one in ``log`` that is not merely its consequence, with advice where known."""
    plain = [_PREFIX.sub("", line).strip() for line in log.splitlines()]
    exceptions = [line for line in plain if _EXCEPTION.match(line)]
    causes = [line for line in exceptions if not any(text in line for text in _CONSEQUENCES)]
    found = (causes or exceptions or [line for line in plain if line] or ["vLLM wrote nothing to its log"])[-1]
    advice = next((hint for text, hint in _ADVICE.items() if text.lower() in log.lower()), None)
    return f"{found[:500]} ({advice})" if advice else found[:500]
