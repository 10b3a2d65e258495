"""Taken ports are told by number, holder and setting, or replaced where asked."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from parampara.errors import Unavailable
from parampara.settings import Settings
from standalone.ports import Wish, choose, free_port, holder, is_free, wishes


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_taken_port_is_named_with_holder_and_setting(taken: int) -> None:
    with pytest.raises(Unavailable) as caught:
        choose([Wish("gateway", "127.0.0.1", taken, "PARAMPARA_GATEWAY__PORT")], auto=False)
    assert caught.value.code == "port_taken"
    for words in (f"port {taken}", f"pid {os.getpid()}", "PARAMPARA_GATEWAY__PORT", "--auto-ports"):
        assert words in caught.value.message


def test_auto_takes_another_port_and_keeps_the_free_ones(taken: int) -> None:
    free = free_port()
    chosen = choose([Wish("a", "127.0.0.1", taken, "A"), Wish("b", "127.0.0.1", free, "B")], auto=True)
    assert chosen["b"] == free
    assert chosen["a"] not in (taken, free)
    assert is_free("127.0.0.1", chosen["a"])


def test_two_services_on_one_port_are_refused() -> None:
    port = free_port()
    with pytest.raises(Unavailable, match="SECOND"):
        choose([Wish("a", "127.0.0.1", port, "FIRST"), Wish("b", "127.0.0.1", port, "SECOND")], auto=False)


def test_nobody_holds_a_free_port_by_name() -> None:
    assert "another process" in holder(free_port())


def test_every_port_of_the_stack_has_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for wish in wishes(Settings()):
        monkeypatch.setenv(wish.setting, "12345")
        assert next(other for other in wishes(Settings()) if other.service == wish.service).port == 12345
