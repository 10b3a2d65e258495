"""The supervisor's HTTP face: ``PUT``, ``GET`` and ``DELETE /deployment``, health and metrics. Internal network only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import structlog
import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from model_server.command import Wanted, interpreter_of
from model_server.memory import Report, Verdict
from model_server.supervisor import Supervisor
from parampara.http import exit_zero_on_sigterm, install_docs, install_error_handlers
from parampara.settings import ModelServerSettings, Settings, get_settings
from parampara.telemetry import configure_logging

log = structlog.get_logger("model_server")


def create_app(settings: Settings) -> FastAPI:
    """The supervisor as an ASGI application; starting it restores the deployment of last time."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        supervisor = app.state.supervisor = Supervisor(settings)
        await asyncio.to_thread(warn_without_bitsandbytes, settings.model_server)
        keeper = asyncio.create_task(supervisor.keep())
        keeper.add_done_callback(_report_end)
        yield
        await supervisor.shutdown()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper

    about = "Starts, watches and swaps the vLLM server of this machine."
    app = FastAPI(title="model_server", description=about, lifespan=lifespan, redoc_url=None, docs_url=None)
    install_docs(app)

    @app.put("/deployment", status_code=202)
    async def put_deployment(wanted: Wanted) -> Report:
        return app.state.supervisor.put(wanted)

    @app.get("/deployment")
    async def get_deployment() -> Report:
        return app.state.supervisor.report()

    @app.post("/deployment/verdict")
    async def judge_deployment(verdict: Verdict) -> Report:
        return app.state.supervisor.judge(verdict)

    @app.delete("/deployment")
    async def delete_deployment() -> Report:
        return app.state.supervisor.clear()

    @app.get("/health")
    @app.get("/livez")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready() -> dict[str, str]:
        """Ready to accept deployments; whether a model answers is told by ``deployment``."""
        return {"status": "ok", "deployment": app.state.supervisor.report().status}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    install_error_handlers(app, service="model_server", max_body_bytes=1_048_576)
    return app


def warn_without_bitsandbytes(settings: ModelServerSettings) -> bool:
    """Whether vLLM's environment can load bitsandbytes checkpoints; vLLM itself would say so only after a slow start."""
    interpreter = interpreter_of(settings.vllm_command)
    if interpreter is None:
        log.warning("cannot tell which Python runs vLLM; its plugins are not checked", command=settings.vllm_command)
        return False
    code = "from importlib.metadata import version as v; v('vllm-bnb-plugin'); v('bitsandbytes')"
    try:
        found = subprocess.run([str(interpreter), "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("vLLM's Python does not run", interpreter=str(interpreter), error=str(error))
        return False
    if not found:
        advice = "install vllm-bnb-plugin and bitsandbytes beside it"
        log.warning(f"vLLM cannot load bitsandbytes checkpoints: {advice}", interpreter=str(interpreter))
    return found


def serve() -> None:
    """Run the supervisor until SIGTERM."""
    exit_zero_on_sigterm()
    configure_logging("model_server")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a health probe every few seconds is no news
    settings = get_settings()
    server = settings.model_server
    uvicorn.run(create_app(settings), host=server.host, port=server.port, access_log=False, log_config=None)


def _report_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the keeper of the deployment ended; this process stops so that it is started anew", exc_info=error)
        os.kill(os.getpid(), signal.SIGTERM)
