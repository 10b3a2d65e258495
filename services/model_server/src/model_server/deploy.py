"""Stage ``deploy``: ask the model server for a deployment, wait until the model has answered, and hold its answers against the evaluation.

With an evaluation the deployment is on trial: the model server keeps the one before as the one to go back to, until the gates on the live
endpoint have decided.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from model_server.live import replay
from model_server.live.endpoint import Endpoint
from parampara import gates
from parampara.errors import InvalidRequest, NotFound, Preempted, Unavailable
from parampara.execution import stop
from parampara.progress import Progress
from parampara.schemas.expectations import FILE_NAME, Expectations, read_expectations
from parampara.schemas.stages import DeployConfig, DeployResult, Gate, GateResult

POLL_SECONDS = 1.0
_UNREACHABLE_SECONDS = 60.0
_NOTICED_SECONDS = 15.0


def run(config: DeployConfig, *, workdir: Path, progress: Progress) -> DeployResult:
    """Serve ``config.model_path`` under ``config.model_name``; returns once vLLM has generated an answer and, where there is an evaluation,
    its live endpoint was measured. A result whose decision is not ``promote`` means that the model before is served again.

    Raises:
        InvalidData: the evaluation's expectations cannot be read.
        InvalidRequest: vLLM cannot serve this model (``deployment_failed``, with its own words), or a newer deployment won.
        Unavailable: the model server does not answer, or the model was not ready in time.
        Preempted: the worker was asked to stop; the model server goes on alone and the next attempt finds it so.
    """
    began = time.monotonic()
    expected = read_expectations(config.evaluation) if config.evaluation is not None else None
    progress.phase("ask the model server")
    with httpx.Client(base_url=config.model_server_url, timeout=10, trust_env=False) as client:
        _put(client, config)
        progress.phase("vLLM loads the model")
        report = _wait(client, config, progress)
        ready = time.monotonic() - began
        progress.event("the model answered its first question", answer=report["first_answer"], ready_seconds=report["ready_seconds"])
        metrics = {} if expected is None else _measure(client, config, expected, url=report["vllm_url"], progress=progress)
        results = [] if config.evaluation is None else gates.apply(live_gates(config), metrics)
        decision = gates.decide(results)
        if config.evaluation is not None:
            _judge(client, config, results, decision)
    return DeployResult(
        model_name=config.model_name,
        alias=config.alias,
        url=report["vllm_url"],
        generation=config.generation,
        ready_seconds=round(ready, 2),
        first_answer=report["first_answer"] or "",
        metrics=metrics,
        gates=results,
        decision=decision,
        not_measured=None if metrics else _why_not(config),
    )


def live_gates(config: DeployConfig) -> list[Gate]:
    """The recipe's gates on the live endpoint, and the bounds of ``params.live`` on metrics that it does not name."""
    named = {gate.metric for gate in config.gates}
    return [*config.gates, *(gate for gate in config.params.live.gates() if gate.metric not in named)]


def _why_not(config: DeployConfig) -> str:
    if config.evaluation is None:
        return "deployed without an evaluation: live parity was not measured"
    return f"the evaluation holds no usable {FILE_NAME}, or vLLM refused every request: the job's events say which"


def _measure(client: httpx.Client, config: DeployConfig, expected: Expectations, *, url: str, progress: Progress) -> dict[str, float]:
    endpoint = Endpoint(client, url=url, model=config.model_name)
    try:
        return replay.measure(endpoint, expected, model_path=config.model_path, progress=progress)
    except Unavailable:
        report = _report_after(client)
        if report is not None and report["status"] == "failed" and not _replaced(report, config):
            raise InvalidRequest(f"vLLM died while {config.model_name} was measured: {report['error']}", code="deployment_failed") from None
        raise


def _report_after(client: httpx.Client) -> dict | None:
    """What the model server says of a vLLM that has stopped answering, once it has noticed; None when it says nothing itself."""
    report: dict | None = None
    deadline = time.monotonic() + _NOTICED_SECONDS
    while time.monotonic() < deadline:
        try:
            report = client.get("/deployment").json()
        except (httpx.HTTPError, ValueError):
            return None
        if report is None or report["status"] != "ready":
            return report
        _pause()
    return report


def _judge(client: httpx.Client, config: DeployConfig, results: Sequence[GateResult], decision: gates.Decision) -> None:
    """Accept the deployment, or send the model server back to the one before."""
    missed = [f"{result.metric} = {result.value}" for result in results if not result.passed and result.action == decision]
    body = config.model_dump(mode="json", include={"model_name", "alias", "generation"})
    accepted = decision == "promote"
    reason = "" if accepted else f"the live endpoint missed its gates: {', '.join(missed)}"
    try:
        answer = client.post("/deployment/verdict", json={**body, "accepted": accepted, "reason": reason[:10_000]})
    except httpx.HTTPError as error:
        raise Unavailable(f"The model server at {config.model_server_url} does not answer: {error}", code="model_server_away") from None
    if answer.status_code >= 400:
        raise _refusal(answer)


def _put(client: httpx.Client, config: DeployConfig) -> None:
    body = config.model_dump(mode="json", include={"artifact_id", "model_path", "model_name", "alias", "generation", "params"})
    body["trial"] = config.evaluation is not None
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
