"""The standalone stack: everything as one process tree, started in order, watched, and stopped whole.

All processes are made by the main thread, because the kernel ties them to the thread that made them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from parampara.errors import Unavailable
from parampara.settings import Settings
from standalone import state
from standalone.places import Places
from standalone.plan import platform_environment, services
from standalone.ports import Claims, Endpoint, choose, endpoints
from standalone.postgres import EmbeddedPostgres
from standalone.processes import Child, Spec, created_at, end_leftovers, tail
from standalone.redis_server import EmbeddedRedis

START_SECONDS = 240.0
START_CRASHES = 3
_TICK_SECONDS = 0.2


class Display(Protocol):
    """Where the stack shows itself."""

    def update(self, children: list[Child]) -> None: ...

    def note(self, text: str) -> None: ...


class StackFailed(Unavailable):
    """A process of the stack did not become ready."""

    code = "stack_failed"


class _Interrupted(Exception):
    """SIGINT or SIGTERM arrived."""


class Stack:
    """One stack on one home folder."""

    def __init__(self, places: Places, display: Display, *, auto_ports: bool = False) -> None:
        self._places = places
        self._display = display
        self._auto_ports = auto_ports
        self._children: list[Child] = []
        self._claims = Claims()
        self._at: dict[str, Endpoint] = {}
        self._status = "starting"
        self._interrupted = False

    def run(self, *, on_ready: Callable[[state.StackState], None]) -> None:
        """Start everything, call ``on_ready``, watch until SIGINT or SIGTERM, stop everything.

        Raises:
            WrongState: another stack holds the home folder.
            Unavailable: a port is taken, or a process does not become ready.
        """
        with state.only_stack(self._places), self._signals():
            try:
                self._start()
                self._status = "ready"
                self._save()
                on_ready(self._state())
                while True:
                    self._tick()
            except _Interrupted:
                self._display.note("stopping")
            finally:
                self._stop()
                self._claims.close()

    def _start(self) -> None:
        places = self._places
        places.logs.mkdir(parents=True, exist_ok=True)
        if ended := end_leftovers(state.leftovers(state.load(places))):
            self._display.note(f"ended {len(ended)} processes that a killed stack had left behind")
        places.state.unlink(missing_ok=True)
        # the home as the services will see it, whatever the caller's working directory
        os.environ["PARAMPARA_HOME"] = str(places.home)
        settings = Settings()
        self._at = choose(endpoints(settings), self._claims, auto=self._auto_ports)
        database, redis = self._start_servers()
        environment = platform_environment(places, settings, at=self._at, database=database, redis=redis)
        self._migrate(database, environment)
        specs = services(self._at, self._claims)
        self._children += [Child(_with(spec, environment), log=places.logs / f"{spec.name}.log") for spec in specs]
        self._bring_up([child for child in self._children if child.state == "waiting"])

    def _start_servers(self) -> tuple[str, str]:
        """Postgres and Redis; URLs that the user set mean servers of the user's own."""
        database, redis = os.environ.get("PARAMPARA_DATABASE__URL"), os.environ.get("PARAMPARA_REDIS__URL")
        postgres = None
        if database is None:
            postgres = EmbeddedPostgres(self._places.home)
            self._display.note("preparing Postgres")
            postgres.prepare(self._display.note)
            self._children.append(Child(postgres.spec(), log=self._places.logs / "postgres.log"))
            database = postgres.url
        if redis is None:
            embedded = EmbeddedRedis(self._places.home, self._claims)
            self._children.append(Child(embedded.spec(), log=self._places.logs / "redis.log"))
            redis = embedded.url
        self._bring_up(self._children)
        if postgres is not None:
            postgres.create_database()
        return database, redis

    def _migrate(self, database: str, environment: dict[str, str]) -> None:
        log = self._places.logs / "migrate.log"
        with log.open("wb") as sink:
            command = [sys.executable, "-m", "parampara.db.migrate"]
            settings = {**os.environ, **environment, "PARAMPARA_DATABASE__URL": database}
            done = subprocess.run(command, env=settings, stdout=sink, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise StackFailed(f"The database could not be migrated:\n{tail(log, lines=15)}\n(whole log: {log})")

    def _bring_up(self, children: list[Child]) -> None:
        """Start ``children`` and wait until each is ready."""
        for child in children:
            child.start()
        self._save()
        deadline = time.monotonic() + START_SECONDS
        while not all(child.state == "ready" for child in children):
            self._tick()
            for child in children:
                if child.restarts >= START_CRASHES:
                    raise StackFailed(
                        f"{child.spec.name} ended {child.restarts} times while starting (last exit code {child.exit_code}):\n"
                        f"{child.tail(15)}\n(whole log: {child.log})"
                    )
            if time.monotonic() > deadline:
                late = next(child for child in children if child.state != "ready")
                raise StackFailed(f"{late.spec.name} was not ready after {START_SECONDS:.0f} s:\n{late.tail(15)}\n(whole log: {late.log})")

    def _tick(self) -> None:
        if self._interrupted:
            raise _Interrupted
        changed = False
        for child in self._children:
            if child.state == "waiting":
                continue
            died_before = child.restarts
            changed |= child.tick()
            if child.restarts > died_before and self._status == "ready":
                self._display.note(f"{child.spec.name} ended (exit code {child.exit_code}) and is started again; log: {child.log}")
        self._display.update(self._children)
        if changed:
            self._save()
        time.sleep(_TICK_SECONDS)

    def _stop(self) -> None:
        """Services first, all at once, then Redis and Postgres."""
        self._status = "stopping"
        with suppress(OSError):  # a full disk must not keep processes alive
            self._save()
        servers = [child for child in self._children if child.spec.name in ("redis", "postgres")]
        for group in ([child for child in self._children if child not in servers], servers):
            for child in group:
                child.ask_to_stop()
            for child in group:
                child.stop()
                self._display.update(self._children)
        self._places.state.unlink(missing_ok=True)

    def _state(self) -> state.StackState:
        return state.StackState(
            pid=os.getpid(),
            status=self._status,
            gateway_url=self._at["gateway"].url if self._at else "",
            ports={name: endpoint.port for name, endpoint in self._at.items()},
            processes=state.records(self._children, created_at),
        )

    def _save(self) -> None:
        state.save(self._places, self._state())

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(signum: int, frame: FrameType | None) -> None:
            self._interrupted = True

        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {name: signal.signal(name, note) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)


def _with(spec: Spec, environment: dict[str, str]) -> Spec:
    return Spec(**{**vars(spec), "environment": {**environment, **spec.environment}})
