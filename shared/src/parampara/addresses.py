"""From the address that a server listens on to the one it is reached under."""

from __future__ import annotations

_EVERY_INTERFACE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def local_url(host: str, port: int) -> str:
    """The base URL of a server of this machine; one that listens on every interface is reached on the loopback one."""
    reached = _EVERY_INTERFACE.get(host, host)
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"
