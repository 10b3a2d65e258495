"""API keys: their form, their hash, and the secrets around them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parampara.errors import Forbidden, Unauthorized
from parampara.keys import Principal, bearer, hash_key, new_key, read_pepper, well_formed, write_secret
from parampara.settings import Settings
from parampara.telemetry import redact


def test_keys_differ_and_carry_their_checksum() -> None:
    keys = {new_key() for _ in range(200)}
    assert len(keys) == 200
    assert all(well_formed(key) and len(key) == 52 for key in keys)


@given(st.integers(0, 51), st.characters(codec="ascii"))
def test_one_wrong_character_is_noticed(place: int, character: str) -> None:
    key = new_key()
    changed = key[:place] + character + key[place + 1 :]
    assert well_formed(changed) == (changed == key)


@given(st.text(st.characters()))
def test_any_text_can_be_asked_about(text: str) -> None:
    assert not well_formed(text)


def test_the_hash_needs_the_pepper_and_the_whole_key() -> None:
    key = new_key()
    assert hash_key(b"a", key) == hash_key(b"a", key)
    assert len({hash_key(b"a", key), hash_key(b"b", key), hash_key(b"a", key[:-1])}) == 3
    assert key not in hash_key(b"a", key)


def test_secrets_are_private_and_never_replaced(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    pepper = read_pepper(settings)
    path = tmp_path / "home" / "key-pepper"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not write_secret(path, "other")
    assert read_pepper(settings) == pepper
    assert len(pepper) == 64
    assert [entry.name for entry in path.parent.iterdir()] == ["key-pepper"]
    assert read_pepper(Settings(home=tmp_path, key_pepper="given")) == b"given"  # type: ignore[arg-type]


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer  ", "Basic abc", "bearerabc"])
def test_a_header_without_a_key_is_refused(header: str | None) -> None:
    with pytest.raises(Unauthorized, match="No API key"):
        bearer(header)


def test_scopes() -> None:
    Principal("key_1", "x", frozenset({"admin"})).require("jobs")
    with pytest.raises(Forbidden, match="'admin'"):
        Principal("key_1", "x", frozenset({"jobs", "chat"})).require("admin")


def test_a_key_in_a_log_record_is_cut_out() -> None:
    key = new_key()
    assert key[8:] not in str(redact(None, "info", {"event": f"refused {key}", "header": f"Bearer {key}"}))
