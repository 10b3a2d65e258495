"""Stage ``deploy``: ask the model server for a deployment and wait until the model has answered."""

from __future__ import annotations

import time
from pathlib import Path

import httpx

from parampara.errors import InvalidRequest, NotFound, Preempted, Unavailable
from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.stages import DeployConfig, DeployResult

POLL_SECONDS = 1.0
_UNREACHABLE_SECONDS = 60.0


def run(config: DeployConfig, *, workdir: Path, progress: Progress) -> DeployResult:
    """Serve ``config.model_path`` under ``config.model_name``; returns once vLLM has generated an answer.

    Raises:
        InvalidRequest: vLLM cannot serve this model (``deployment_failed``, with its own words), or a newer deployment won.
        Unavailable: the model server does not answer, or the model was not ready in time.
        Preempted: the worker was asked to stop; the model server goes on alone and the next attempt finds it so.
    """
    began = time.monotonic()
    progress.phase("ask the model server")
    with httpx.Client(base_url=config.model_server_url, timeout=10, trust_env=False) as client:
        _put(client, config)
        progress.phase("vLLM loads the model")
        report = _wait(client, config, progress)
    progress.event("the model answered its first question", answer=report["first_answer"], ready_seconds=report["ready_seconds"])
    return DeployResult(
        model_name=config.model_name,
        alias=config.alias,
        url=report["vllm_url"],
        generation=config.generation,
        ready_seconds=round(time.monotonic() - began, 2),
        first_answer=report["first_answer"] or "",
    )


def _put(client: httpx.Client, config: DeployConfig) -> None:
    body = config.model_dump(mode="json", include={"artifact_id", "model_path", "model_name", "alias", "generation", "params"})
    deadline = time.monotonic() + _UNREACHABLE_SECONDS
    while True:
        try:
            answer = client.put("/deployment", json=body)
            break
        except httpx.HTTPError as error:
            if time.monotonic() > deadline:
                message = f"The model server at {config.model_server_url} does not answer: {error}"
                raise Unavailable(message, code="model_server_away") from None
        _pause()
    if answer.status_code >= 400:
        raise _refusal(answer)


def _wait(client: httpx.Client, config: DeployConfig, progress: Progress) -> dict:
    timeout = config.params.ready_timeout_seconds + _UNREACHABLE_SECONDS
    deadline = time.monotonic() + timeout
    told: str | None = None
    while time.monotonic() < deadline:
        _pause()
        try:
            report = client.get("/deployment").json()
        except (httpx.HTTPError, ValueError):
            continue  # a model server that restarts remembers what it was asked for
        if _replaced(report, config):
            raise InvalidRequest(
                f"Generation {report['generation']} ({report['model_name']}) replaced generation {config.generation} on the model server.",
                param="generation",
                code="superseded",
            )
        if report["status"] == "ready" and report["serving"] == config.model_name:
            return report
        if report["status"] == "failed":
            progress.event(report["error"] or "vLLM failed", level="error", log_tail=report["log_tail"])
            raise InvalidRequest(f"vLLM cannot serve {config.model_name}: {report['error']}", code="deployment_failed")
        if report["error"] and report["error"] != told:
            told = str(report["error"])
            progress.event(told, level="warn", restarts=report["restarts"])
    raise Unavailable(f"{config.model_name} was not ready {timeout:.0f} s after it was asked for.", code="deployment_timeout")


def _replaced(report: dict, config: DeployConfig) -> bool:
    """Another alias may share the model; anything else that is wanted now is not this deployment."""
    if report["model_name"] != config.model_name:
        return True
    return report["alias"] == config.alias and report["generation"] != config.generation


def _pause() -> None:
    deadline = time.monotonic() + POLL_SECONDS
    while time.monotonic() < deadline:
        if stop.requested():
            raise Preempted("The worker was asked to stop while the model was loading; the next attempt goes on from there.")
        time.sleep(0.1)


def _refusal(answer: httpx.Response) -> InvalidRequest | NotFound | Unavailable:
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        return Unavailable(f"The model server answered {answer.status_code}: {answer.text[:200]}")
    if answer.status_code >= 500:
        return Unavailable(f"The model server answered {answer.status_code}: {error['message']}")
    return InvalidRequest(error["message"], param=error["param"], code=error["code"])
