"""What the stack consists of: every process, its environment, and how to tell that it is ready."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from parampara.settings import Settings
from standalone.places import Places, vllm_command, vllm_on_cpu
from standalone.ports import Claims, Endpoint, free_port
from standalone.processes import Spec

WORKERS = {
    "train": "trainer",
    "merge": "merger",
    "quantize": "quantizer",
    "evaluate": "evaluator",
    "ingest": "ingestor",
    "deploy": "model_server",
}
"""Queue to the service whose ``worker`` serves it."""
_MAX_THREADS = 8
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def platform_environment(places: Places, settings: Settings, *, at: Mapping[str, Endpoint], database: str, redis: str) -> dict[str, str]:
    """The ``PARAMPARA_*`` settings that tie the services to each other. What the user set stays as set."""
    models = {"tiny-llama": str(places.base_model), **settings.base_models}
    computed = {
        "PARAMPARA_HOME": str(places.home),
        "PARAMPARA_BASE_MODELS": json.dumps(models),
        "PARAMPARA_DATABASE__URL": database,
        "PARAMPARA_REDIS__URL": redis,
        "PARAMPARA_GATEWAY__PORT": str(at["gateway"].port),
        "PARAMPARA_GATEWAY__CONTROL_PLANE_URL": at["control_plane"].url,
        "PARAMPARA_GATEWAY__MODEL_URL": at["vllm"].url,
        "PARAMPARA_GATEWAY__EMBEDDER_URL": at["embedder"].url,
        "PARAMPARA_CONTROL_PLANE__PORT": str(at["control_plane"].port),
        "PARAMPARA_EMBEDDER__PORT": str(at["embedder"].port),
        "PARAMPARA_MODEL_SERVER__PORT": str(at["model_server"].port),
        "PARAMPARA_MODEL_SERVER__VLLM_PORT": str(at["vllm"].port),
        "PARAMPARA_MODEL_SERVER__URL": at["model_server"].url,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    defaults = {
        "PARAMPARA_MODEL_SERVER__CPU": "true" if vllm_on_cpu(places.project) else "false",
        # weights come from the catalogue or from the local cache; nothing is fetched behind the user's back
        "HF_HUB_OFFLINE": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    if "PARAMPARA_MODEL_SERVER__VLLM_COMMAND" not in os.environ:
        computed["PARAMPARA_MODEL_SERVER__VLLM_COMMAND"] = json.dumps(vllm_command(places.project))
    return {**{key: value for key, value in defaults.items() if key not in os.environ}, **computed}


def services(at: Mapping[str, Endpoint], claims: Claims) -> list[Spec]:
    """The platform's own processes; Postgres and Redis have to be up before."""
    http = [
        _http(at["control_plane"], threads=1),
        _http(at["gateway"], threads=1),
        _http(at["embedder"], threads=min(2, _threads())),
        _http(at["model_server"], threads=1, stop_seconds=60),
    ]
    return [*http, *(_worker(queue, service, free_port(claims)) for queue, service in WORKERS.items())]


def answers(url: str) -> Callable[[], bool]:
    """A probe: ``GET url`` is answered with 200 within two seconds."""

    def probe() -> bool:
        try:
            with _NO_PROXY.open(url, timeout=2) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError, ValueError):
            return False

    return probe


def _http(at: Endpoint, *, threads: int, stop_seconds: float = 20) -> Spec:
    return Spec(
        at.service,
        [sys.executable, "-m", at.service, "serve"],
        answers(f"{at.url}/readyz"),
        environment=_thread_limits(threads),
        where=at.url,
        port=at.port,
        stop_seconds=stop_seconds,
    )


def _worker(queue: str, service: str, port: int) -> Spec:
    return Spec(
        f"worker-{queue}",
        [sys.executable, "-m", service, "worker"],
        answers(f"http://127.0.0.1:{port}/readyz"),
        environment={**_thread_limits(_threads()), "PARAMPARA_WORKER__METRICS_PORT": str(port)},
        where=f"queue {queue}",
        port=port,
        stop_seconds=30,
    )


def _threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MAX_THREADS)


def _thread_limits(threads: int) -> dict[str, str]:
    return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
