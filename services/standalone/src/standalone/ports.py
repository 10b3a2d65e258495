"""The stack's TCP ports: which it wants, who holds one that is taken, and free ones where asked."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import psutil

from parampara.errors import Unavailable
from parampara.settings import Settings


@dataclass(frozen=True)
class Wish:
    """One port of the stack and the environment variable that sets it."""

    service: str
    host: str
    port: int
    setting: str


def wishes(settings: Settings) -> list[Wish]:
    """The ports of the stack as configured."""
    server = settings.model_server
    return [
        Wish("gateway", settings.gateway.host, settings.gateway.port, "PARAMPARA_GATEWAY__PORT"),
        Wish("control_plane", settings.control_plane.host, settings.control_plane.port, "PARAMPARA_CONTROL_PLANE__PORT"),
        Wish("vllm", server.vllm_host, server.vllm_port, "PARAMPARA_MODEL_SERVER__VLLM_PORT"),
        Wish("embedder", settings.embedder.host, settings.embedder.port, "PARAMPARA_EMBEDDER__PORT"),
        Wish("model_server", server.host, server.port, "PARAMPARA_MODEL_SERVER__PORT"),
    ]


def choose(wanted: list[Wish], *, auto: bool) -> dict[str, int]:
    """Service to port. With ``auto`` a taken port is replaced by a free one.

    Raises:
        Unavailable: ports are taken and ``auto`` is off; names each port, its holder and its setting.
    """
    chosen: dict[str, int] = {}
    taken: list[Wish] = []
    for wish in wanted:
        if wish.port not in chosen.values() and is_free(wish.host, wish.port):
            chosen[wish.service] = wish.port
        elif auto:
            chosen[wish.service] = free_port(wish.host, avoid=set(chosen.values()) | {other.port for other in wanted})
        else:
            taken.append(wish)
    if taken:
        lines = [f"  port {wish.port} ({wish.service}) is held by {holder(wish.port)}; set {wish.setting} to another" for wish in taken]
        raise Unavailable("Ports are taken:\n" + "\n".join(lines) + "\nor add --auto-ports to let the stack choose.", code="port_taken")
    return chosen


def is_free(host: str, port: int) -> bool:
    """Whether this process could listen there now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def free_port(host: str = "127.0.0.1", *, avoid: set[int] | None = None) -> int:
    """A port that nothing listens on now and that is not in ``avoid``."""
    while True:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in (avoid or set()):
            return port


def holder(port: int) -> str:
    """Who listens on ``port``, in words; other users' processes may be invisible to us."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            local = connection.laddr
            if connection.status == psutil.CONN_LISTEN and local and local.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return f"{process.name()} (pid {process.pid}, {' '.join(process.cmdline())[:80]})"
    except (psutil.Error, OSError):
        pass
    return "another process (of another user, so it cannot be named)"
