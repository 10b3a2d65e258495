"""Taken ports are told by number, holder and setting, or replaced where asked; no two stacks ever get the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parampara.addresses import local_url
from parampara.errors import Unavailable
from parampara.settings import Settings
from standalone.places import Places
from standalone.plan import platform_environment, services
from standalone.ports import Claims, Endpoint, choose, endpoints, holder
from tests.conftest import free_port as unused

CHOOSER = """
import sys
from parampara.settings import Settings
from standalone.ports import Claims, choose, endpoints, free_port
claims = Claims()
chosen = choose(endpoints(Settings()), claims, auto=True)
print(*(endpoint.port for endpoint in chosen.values()), *(free_port(claims) for _ in range(7)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def claims() -> Iterator[Claims]:
    claims = Claims()
    yield claims
    claims.close()


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_taken_port_is_named_with_holder_and_setting(taken: int, claims: Claims) -> None:
    with pytest.raises(Unavailable) as caught:
        choose([Endpoint("gateway", "127.0.0.1", taken, "PARAMPARA_GATEWAY__PORT")], claims, auto=False)
    assert caught.value.code == "port_taken"
    for words in (f"port {taken}", f"pid {os.getpid()}", "PARAMPARA_GATEWAY__PORT", "--auto-ports"):
        assert words in caught.value.message


def test_auto_takes_another_port_and_keeps_the_free_ones(taken: int, claims: Claims) -> None:
    free = unused()
    chosen = choose([Endpoint("a", "127.0.0.1", taken, "A"), Endpoint("b", "127.0.0.1", free, "B")], claims, auto=True)
    assert chosen["b"].port == free
    assert chosen["a"].port not in (taken, free)
    assert chosen["a"].url == f"http://127.0.0.1:{chosen['a'].port}"


def test_two_services_on_one_port_are_refused(claims: Claims) -> None:
    port = unused()
    with pytest.raises(Unavailable, match="SECOND"):
        choose([Endpoint("a", "127.0.0.1", port, "FIRST"), Endpoint("b", "127.0.0.1", port, "SECOND")], claims, auto=False)


def test_stacks_that_start_at_the_same_time_never_get_the_same_port() -> None:
    """Each claims what it chose, although nothing listens there yet: vLLM's port has no listener until the first deployment."""
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    stacks = [subprocess.Popen([sys.executable, "-c", CHOOSER], **options) for _ in range(3)]
    try:
        ports = [port for stack in stacks if stack.stdout is not None for port in stack.stdout.readline().split()]
    finally:
        for stack in stacks:
            stack.communicate()
    assert len(ports) == 3 * 12
    assert len(set(ports)) == len(ports)


def test_a_port_that_another_stack_claimed_is_refused_by_its_name_and_free_again_when_that_stack_is_killed(claims: Claims) -> None:
    stack = subprocess.Popen([sys.executable, "-c", CHOOSER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert stack.stdout is not None
    port = int(stack.stdout.readline().split()[2])
    wanted = [Endpoint("vllm", "127.0.0.1", port, "PARAMPARA_MODEL_SERVER__VLLM_PORT")]
    with pytest.raises(Unavailable, match=f"pid {stack.pid}"):
        choose(wanted, claims, auto=False)
    stack.kill()
    stack.communicate()
    assert choose(wanted, claims, auto=False)["vllm"].port == port


def test_nobody_holds_a_free_port_by_name() -> None:
    assert "another process" in holder(unused())


def test_an_address_that_cannot_be_had_is_not_called_a_taken_port(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = Endpoint("gateway", "192.0.2.1", unused(), "PARAMPARA_GATEWAY__PORT")
    with pytest.raises(Unavailable, match=r"'192.0.2.1' \(gateway\) is no address of this machine; set PARAMPARA_GATEWAY__HOST"):
        choose([foreign], claims, auto=True)  # another port would not help
    unknown = Endpoint("vllm", "no address", unused(), "PARAMPARA_MODEL_SERVER__VLLM_PORT")
    with pytest.raises(Unavailable, match="PARAMPARA_MODEL_SERVER__VLLM_HOST"):
        choose([unknown], claims, auto=False)

    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)  # as for port 80 without rights; tests may run as root
    with pytest.raises(Unavailable, match=r"port 80 \(gateway\) may not be used by this account"):
        choose([Endpoint("gateway", "127.0.0.1", 80, "PARAMPARA_GATEWAY__PORT")], claims, auto=False)


def test_every_port_of_the_stack_has_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for endpoint in endpoints(Settings()):
        monkeypatch.setenv(endpoint.setting, "12345")
        assert next(other for other in endpoints(Settings()) if other.service == endpoint.service).port == 12345


def test_services_are_probed_and_named_where_they_listen(monkeypatch: pytest.MonkeyPatch, claims: Claims, tmp_path: Path) -> None:
    """A service bound to one address of the machine does not answer on 127.0.0.1."""
    for name in ("GATEWAY__HOST", "CONTROL_PLANE__HOST", "EMBEDDER__HOST", "MODEL_SERVER__HOST", "MODEL_SERVER__VLLM_HOST"):
        monkeypatch.setenv(f"PARAMPARA_{name}", "127.0.0.2")
    monkeypatch.setenv("PARAMPARA_MODEL_SERVER__VLLM_COMMAND", '["vllm"]')
    at = choose(endpoints(Settings()), claims, auto=True)
    for spec in services(at, claims):
        if not spec.name.startswith("worker-"):
            assert spec.where == f"http://127.0.0.2:{spec.port}"
    places = Places(project=tmp_path, home=tmp_path)
    environment = platform_environment(places, Settings(), at=at, database="", redis="")
    assert environment["PARAMPARA_GATEWAY__MODEL_URL"] == at["vllm"].url
    urls = [value for key, value in environment.items() if key.endswith("_URL") and "__" in key and value]
    assert len(urls) == 4
    assert all(url.startswith("http://127.0.0.2:") for url in urls)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("fd00::5", "http://[fd00::5]:8000"),
        ("model-server", "http://model-server:8000"),
    ],
)
def test_a_server_is_reached_where_it_listens(host: str, url: str) -> None:
    assert local_url(host, 8000) == url
