"""Keeps one wanted model served: starts vLLM, proves that it answers, restarts it when it dies, swaps and rolls back.

``PUT /deployment`` only changes what is wanted; one task, :meth:`Supervisor.keep`, makes it true. A deployment counts as
ready after ``/health`` and a real generated answer. When a new one cannot start, the last one that worked is started again
and the failed one is reported as failed. What is wanted is on disk before anything is started, so a restarted supervisor
goes on where the last one was.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable
from pathlib import Path

import httpx
import structlog
from prometheus_client import Counter, Gauge

from model_server.command import Wanted, build_command, build_environment, log_configuration
from model_server.engine import Engine, require_free_port
from model_server.failure import reason
from model_server.memory import Memory, Report, Status, Verdict, remember
from model_server.probe import first_answer, healthy
from parampara.addresses import local_url
from parampara.errors import ParamparaError, Unavailable, UpstreamFailed, WrongState
from parampara.settings import Settings
from parampara.storage import write_atomically

BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
HEALTH_SECONDS = 5.0
HEALTH_MISSES = 6
_STABLE_SECONDS = 60.0

RESTARTS = Counter("parampara_model_server_restarts", "vLLM processes started again after they died.")
READY = Gauge("parampara_model_server_ready", "1 while the wanted model answers.")

log = structlog.get_logger("model_server")


class StartFailed(ParamparaError):
    """vLLM ended, or did not answer in time; ``log_tail`` holds its last lines."""

    code = "start_failed"

    def __init__(self, message: str, *, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class Supervisor:
    """State of the one deployment; all methods run in one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.model_server
        self._home = settings.home.resolve() / "model_server"
        self._home.mkdir(parents=True, exist_ok=True)
        self._memory = remember(self._home / "deployment.json")
        self._changed = asyncio.Event()
        self._stopping = False
        self._engine: Engine | None = None
        self._status: Status = "starting" if self._memory.wanted else "stopped"
        self._first_answer: str | None = None
        self._ready_seconds: float | None = None
        self._restarts = 0
        self._error: str | None = None
        self._log_tail: str | None = None

    @property
    def url(self) -> str:
        return local_url(self._settings.vllm_host, self._settings.vllm_port)

    @property
    def log_file(self) -> Path:
        return self._home / "vllm.log"

    def put(self, wanted: Wanted) -> Report:
        """Make ``wanted`` the model to serve. What vLLM serves already, under this alias or another, is not started again.

        Raises:
            WrongState: a newer generation of this alias was already accepted.
            InvalidData: the model directory cannot be served.
        """
        newest = self._memory.generations.get(wanted.alias, -1)
        if wanted.generation < newest:
            raise WrongState(
                f"Generation {wanted.generation} of alias {wanted.alias!r} is older than {newest}, which was already accepted.",
                param="generation",
                code="stale_generation",
            )
        if self._memory.wanted == wanted and self._memory.failed is None:
            return self.report()
        build_command(wanted, self._settings)  # refuses a directory that is no model before anything is stopped
        before, generations = self._memory.wanted, {**self._memory.generations, wanted.alias: wanted.generation}
        self._store(self._memory.model_copy(update={"wanted": wanted, "generations": generations, "failed": None}))
        if before is not None and wanted.starts_like(before):
            return self.report()  # another alias, or the same one again: vLLM serves or loads exactly this already
        self._become("starting", error=None, log_tail=None)
        self._first_answer = self._ready_seconds = None
        self._restarts = 0
        self._changed.set()
        return self.report()

    def judge(self, verdict: Verdict) -> Report:
        """End a trial: an accepted deployment is the one to go back to from now on, a rejected one is given up like one that failed.

        Raises:
            WrongState: something else is wanted by now, or the deployment does not answer (any more).
        """
        wanted = self._memory.wanted
        if wanted is None or not verdict.is_on(wanted):
            raise WrongState(
                f"Generation {verdict.generation} of alias {verdict.alias!r} ({verdict.model_name}) is not what is wanted now.",
                param="generation",
                code="superseded",
            )
        if self._status != "ready":
            raise WrongState(f"{verdict.model_name} is {self._status} and not ready: there is nothing to judge.", param="model_name")
        if verdict.accepted:
            accepted = wanted.model_copy(update={"trial": False})
            self._store(self._memory.model_copy(update={"wanted": accepted, "proven": accepted}))
            return self.report()
        log.error("deployment rejected", model=wanted.model_name, reason=verdict.reason)
        goes_on = self._memory.proven is not None and self._memory.proven.starts_like(wanted)  # vLLM holds the right model
        self._give_up(verdict.reason or "rejected by its deployer", goes_on=goes_on)
        if not goes_on:
            self._changed.set()
        return self.report()

    def clear(self) -> Report:
        """Serve nothing."""
        self._store(self._memory.model_copy(update={"wanted": None, "proven": None, "failed": None}))
        self._become("stopped", error=None, log_tail=None)
        self._changed.set()
        return self.report()

    def report(self) -> Report:
        """The newest deployment's state."""
        serving = self._memory.wanted.model_name if self._memory.wanted and self._status == "ready" else None
        if self._memory.failed is not None:
            return self._memory.failed.model_copy(update={"serving": serving})
        wanted = self._memory.wanted
        return Report(
            status=self._status,
            model_name=wanted.model_name if wanted else None,
            alias=wanted.alias if wanted else None,
            generation=wanted.generation if wanted else 0,
            artifact_id=wanted.artifact_id if wanted else None,
            vllm_url=self.url if wanted else None,
            serving=serving,
            first_answer=self._first_answer,
            ready_seconds=self._ready_seconds,
            restarts=self._restarts,
            error=self._error,
            log_tail=self._log_tail,
        )

    async def keep(self) -> None:
        """Make what is wanted true, until :meth:`shutdown`."""
        attempt = 0
        async with httpx.AsyncClient(timeout=HEALTH_SECONDS, trust_env=False) as client:
            while not self._stopping:
                self._changed.clear()
                wanted = self._memory.wanted
                if wanted is None:
                    await self._changed.wait()
                    continue
                began = time.monotonic()
                try:
                    await self._serve(client, wanted)
                    attempt = 0
                except ParamparaError as error:
                    attempt = 0 if time.monotonic() - began > _STABLE_SECONDS else attempt
                    await self._recover(wanted, error, attempt)
                    attempt += 1
                finally:
                    READY.set(0)
                    if self._engine is not None:
                        await self._engine.stop()
                        self._engine = None

    async def shutdown(self) -> None:
        """Stop vLLM; what is wanted stays wanted for the next start."""
        self._stopping = True
        self._changed.set()

    async def _serve(self, client: httpx.AsyncClient, wanted: Wanted) -> None:
        """Serve ``wanted`` until something else is wanted.

        Raises:
            ParamparaError: it could not start, or died.
        """
        engine = await self._launch(wanted)
        answer = await self._until_ready(client, engine, wanted)
        if answer is None:
            return
        self._first_answer = answer
        self._ready_seconds = round(time.monotonic() - engine.started_at, 2)
        if self._memory.wanted is not None and not self._memory.wanted.trial:
            self._store(self._memory.model_copy(update={"proven": self._memory.wanted}))
        self._become("ready", error=None, log_tail=None)
        READY.set(1)
        log.info("ready", model=wanted.model_name, seconds=self._ready_seconds)
        await self._watch(client, engine)

    async def _launch(self, wanted: Wanted) -> Engine:
        require_free_port(self._settings.vllm_host, self._settings.vllm_port)
        log_config = self._home / "vllm-logging.json"
        write_atomically(log_config, json.dumps(log_configuration(), indent=1).encode())
        command = build_command(wanted, self._settings)
        environment = build_environment(self._settings, scratch=self._home, log_config=log_config)
        try:
            self._engine = await Engine.start(command, environment, log=self.log_file)
        except OSError as error:
            raise StartFailed(f"vLLM cannot be started: {error}") from None
        log.info("vllm started", pid=self._engine.pid, model=wanted.model_name, generation=wanted.generation)
        return self._engine

    async def _until_ready(self, client: httpx.AsyncClient, engine: Engine, wanted: Wanted) -> str | None:
        """Wait for the first answer. None: something else is wanted meanwhile."""
        deadline = time.monotonic() + wanted.params.ready_timeout_seconds
        while not self._changed.is_set():
            if not engine.running:
                tail = engine.log_tail()
                raise StartFailed(f"vLLM ended with exit code {engine.exit_code}: {reason(tail)}", log_tail=tail)
            if time.monotonic() > deadline:
                raise StartFailed(f"vLLM was not ready after {wanted.params.ready_timeout_seconds} s.", log_tail=engine.log_tail())
            if await healthy(client, self.url):
                try:
                    answer = await first_answer(client, self.url, wanted.model_name)
                except UpstreamFailed as error:
                    raise StartFailed(error.message, log_tail=engine.log_tail()) from None
                # the question takes seconds: what is wanted now may be another model, which this answer says nothing about
                return None if self._changed.is_set() else answer
            await _first([engine.wait(), self._changed.wait()], seconds=0.25)
        return None

    async def _watch(self, client: httpx.AsyncClient, engine: Engine) -> None:
        """Return when something else is wanted; raise when vLLM died or no longer answers ``/health``."""
        misses = 0
        while not self._changed.is_set():
            await _first([engine.wait(), self._changed.wait()], seconds=HEALTH_SECONDS)
            if not engine.running:
                tail = engine.log_tail()
                raise StartFailed(f"vLLM died with exit code {engine.exit_code}: {reason(tail)}", log_tail=tail)
            misses = 0 if await healthy(client, self.url) else misses + 1
            if misses >= HEALTH_MISSES:
                raise StartFailed(f"vLLM did not answer /health {misses} times in a row.", log_tail=engine.log_tail())

    async def _recover(self, wanted: Wanted, error: ParamparaError, attempt: int) -> None:
        """A deployment that worked before is started again; a new one is given up for the last that worked."""
        log.error("vllm failed", model=wanted.model_name, error=error.message)
        if self._changed.is_set() or self._stopping:
            return
        tail = getattr(error, "log_tail", "")
        previous = self._memory.proven
        if not (previous and previous.starts_like(wanted)) and not isinstance(error, Unavailable):
            self._give_up(error.message, tail=tail)
            return
        self._restarts += 1
        RESTARTS.inc()
        self._become("starting", error=error.message, log_tail=tail)
        if self._engine is not None:
            self._engine.sweep()
        await _first([self._changed.wait()], seconds=BACKOFF_SECONDS[min(attempt, len(BACKOFF_SECONDS) - 1)])

    def _give_up(self, error: str, *, tail: str | None = None, goes_on: bool = False) -> None:
        """Report what is wanted as failed and want the last that worked; ``goes_on``: that one is being served already."""
        previous = self._memory.proven
        self._become("failed", error=error, log_tail=tail)
        self._store(self._memory.model_copy(update={"wanted": previous, "failed": self.report()}))
        if previous is not None:
            log.warning("rolled back", model=previous.model_name, generation=previous.generation)
        self._become("ready" if goes_on else "starting" if previous else "failed", error=None, log_tail=None)

    def _become(self, status: Status, *, error: str | None, log_tail: str | None) -> None:
        self._status, self._error, self._log_tail = status, error, log_tail

    def _store(self, memory: Memory) -> None:
        self._memory = memory
        write_atomically(self._home / "deployment.json", memory.model_dump_json(indent=1).encode())


async def _first(waits: list[Awaitable[object]], *, seconds: float) -> None:
    """Return when the first of ``waits`` is done, or after ``seconds``."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
