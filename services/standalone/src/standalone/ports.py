"""The stack's TCP ports: which it wants, who holds one that is taken, and free ones where asked.

A port is chosen seconds before its service listens on it, and vLLM's stays without a listener until the first deployment. So
that no other stack chooses it meanwhile, the choice itself is a claim that others see: see :class:`Claims`.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import psutil

from parampara.addresses import local_url
from parampara.errors import Unavailable
from parampara.settings import Settings

_CLAIM = "parampara-port-"
_OWN_PORTS_FROM = 1024


@dataclass(frozen=True)
class Endpoint:
    """Where a service of the stack listens, and the environment variables that say so."""

    service: str
    host: str
    port: int
    setting: str

    @property
    def url(self) -> str:
        """What others on this machine reach it under."""
        return local_url(self.host, self.port)


class Claims:
    """Ports that this process keeps for its services, for as long as it lives or until :meth:`close`.

    Each claim is a socket in Linux' abstract namespace. That namespace belongs to the network namespace, as TCP ports do, it needs
    no file, and the kernel ends the claims of a process that was killed. Elsewhere claims are not seen by other stacks.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket | None] = {}

    def take(self, port: int) -> bool:
        """Claim ``port``; False when it is claimed already, by this stack or another."""
        if port in self._held:
            return False
        if sys.platform != "linux":
            self._held[port] = None
            return True
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            claim.bind(f"\0{_CLAIM}{port}")
        except OSError:
            claim.close()
            return False
        self._held[port] = claim
        return True

    def close(self) -> None:
        for claim in self._held.values():
            if claim is not None:
                claim.close()
        self._held.clear()


def endpoints(settings: Settings) -> list[Endpoint]:
    """The stack's addresses as configured."""
    server = settings.model_server
    return [
        Endpoint("gateway", settings.gateway.host, settings.gateway.port, "PARAMPARA_GATEWAY__PORT"),
        Endpoint("control_plane", settings.control_plane.host, settings.control_plane.port, "PARAMPARA_CONTROL_PLANE__PORT"),
        Endpoint("vllm", server.vllm_host, server.vllm_port, "PARAMPARA_MODEL_SERVER__VLLM_PORT"),
        Endpoint("embedder", settings.embedder.host, settings.embedder.port, "PARAMPARA_EMBEDDER__PORT"),
        Endpoint("model_server", server.host, server.port, "PARAMPARA_MODEL_SERVER__PORT"),
    ]


def choose(wanted: list[Endpoint], claims: Claims, *, auto: bool) -> dict[str, Endpoint]:
    """Service to the address it gets. With ``auto`` a port that is taken is replaced by a free one.

    Raises:
        Unavailable: an address cannot be had; names each with the reason and its setting.
    """
    chosen: dict[str, Endpoint] = {}
    faults: list[str] = []
    for endpoint in wanted:
        fault = _fault(endpoint)
        if fault is None and claims.take(endpoint.port):
            chosen[endpoint.service] = endpoint
        elif auto and (fault is None or fault.errno == errno.EADDRINUSE):
            port = free_port(claims, endpoint.host, avoid={other.port for other in wanted})
            chosen[endpoint.service] = replace(endpoint, port=port)
        else:
            faults.append(f"  {_in_words(endpoint, fault)}")
    if faults:
        advice = "" if auto else "\nWhere a port is taken, --auto-ports lets the stack choose another."
        raise Unavailable("The stack cannot listen where it should:\n" + "\n".join(faults) + advice, code="port_taken")
    return chosen


def free_port(claims: Claims, host: str = "127.0.0.1", *, avoid: Collection[int] = ()) -> int:
    """A port that nothing listens on, that no stack has claimed and that is not in ``avoid``; claimed now."""
    while True:
        with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            port = int(probe.getsockname()[1])
        if port not in avoid and claims.take(port):
            return port


def holder(port: int) -> str:
    """Who listens on ``port`` or has claimed it, in words; other users' processes may be invisible to us."""
    try:
        for connection in psutil.net_connections(kind="all"):
            if connection.pid and _is_on(connection, port):
                process = psutil.Process(connection.pid)
                return f"{process.name()} (pid {process.pid}, {' '.join(process.cmdline())[:80]})"
    except (psutil.Error, OSError):
        pass
    return "another process (of another user, so it cannot be named)"


def _is_on(connection: Any, port: int) -> bool:
    if connection.family == socket.AF_UNIX:
        return connection.laddr == f"@{_CLAIM}{port}"
    return connection.status == psutil.CONN_LISTEN and bool(connection.laddr) and connection.laddr.port == port


def _fault(endpoint: Endpoint) -> OSError | None:
    """Why this process could not listen there now."""
    with socket.socket(_family(endpoint.host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((endpoint.host, endpoint.port))
        except OSError as error:
            return error
    return None


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _in_words(endpoint: Endpoint, fault: OSError | None) -> str:
    where, port, host = f"({endpoint.service})", f"set {endpoint.setting} to another", endpoint.setting.replace("PORT", "HOST")
    if fault is None or fault.errno == errno.EADDRINUSE:
        return f"port {endpoint.port} {where} is held by {holder(endpoint.port)}; {port}"
    if fault.errno == errno.EACCES:
        return f"port {endpoint.port} {where} may not be used by this account; {port}, {_OWN_PORTS_FROM} or higher"
    if isinstance(fault, socket.gaierror) or fault.errno == errno.EADDRNOTAVAIL:
        return f"{endpoint.host!r} {where} is no address of this machine; set {host}"
    return f"{endpoint.host}:{endpoint.port} {where}: {fault.strerror}; see {host} and {endpoint.setting}"
