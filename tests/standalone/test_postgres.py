"""The embedded Postgres' folders: whole or not there, and nobody else's."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from parampara.errors import Unavailable
from standalone.postgres import EmbeddedPostgres

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs Postgres as another account")
KILLED = """#!/bin/sh
while [ "$1" != -D ]; do shift; done
echo 18 > "$2/PG_VERSION"
kill -9 $$
"""


@pytest.fixture
def home() -> Iterator[Path]:
    # not below pytest's own folder: every pytest that starts closes that one to others, and as root initdb runs as another
    folder = Path(tempfile.mkdtemp(prefix="parampara-pg-"))
    (folder / "home" / "logs").mkdir(parents=True)
    yield folder / "home"
    shutil.rmtree(folder, ignore_errors=True)


def deep(home: Path) -> Path:
    """A home whose path is too long for a socket."""
    path = home / ("deep" * 30)
    (path / "logs").mkdir(parents=True)
    return path


def test_an_initdb_that_was_killed_is_begun_anew(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = EmbeddedPostgres(home)
    (home / "bin").mkdir()
    (home / "bin" / "initdb").write_text(KILLED)
    (home / "bin" / "initdb").chmod(0o755)
    monkeypatch.setattr(killed, "_bin", home / "bin")
    monkeypatch.setattr("standalone.postgres._let_read", lambda tree: None)
    with pytest.raises(Unavailable):
        killed.prepare(print)
    assert not (home / "postgres").exists()
    monkeypatch.undo()
    EmbeddedPostgres(home).prepare(print)
    assert (home / "postgres" / "postgresql.conf").exists()
    assert (home / "postgres").stat().st_mode & 0o077 == 0
    assert not (home / "postgres.new").exists()
    before = (home / "postgres" / "global" / "pg_control").stat().st_mtime_ns
    EmbeddedPostgres(home).prepare(print)
    assert (home / "postgres" / "global" / "pg_control").stat().st_mtime_ns == before


def test_a_folder_in_the_way_is_named_and_left_alone(home: Path) -> None:
    (home / "postgres").mkdir()
    (home / "postgres" / "thesis.txt").write_text("mine")
    with pytest.raises(Unavailable, match=r"postgres is in the way of Postgres' data folder"):
        EmbeddedPostgres(home).prepare(print)
    assert (home / "postgres" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("trap", ["link", "open", "file", pytest.param("foreign", marks=as_root)])
def test_a_socket_folder_that_somebody_else_made_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch, trap: str) -> None:
    """Its name can be guessed, and as root we would give away whatever it points to."""
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setattr(EmbeddedPostgres, "_initdb", lambda self: self._data.mkdir())
    postgres = EmbeddedPostgres(deep(home))
    folder, victim = postgres._sockets, home / "victim"
    victim.mkdir(mode=0o700)
    if trap == "link":
        folder.symlink_to(victim)
    elif trap == "file":
        folder.touch(mode=0o600)
    else:
        folder.mkdir(mode=0o700)
        folder.chmod(0o777 if trap == "open" else 0o700)
        if trap == "foreign":
            os.chown(folder, 12345, 12345)
    with pytest.raises(Unavailable, match="not a private folder of ours"):
        postgres.prepare(print)
    assert victim.stat().st_uid == os.geteuid()
    assert folder.lstat().st_uid == (12345 if trap == "foreign" else os.geteuid())


def test_a_socket_folder_of_ours_is_taken_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(home))
    monkeypatch.setattr(EmbeddedPostgres, "_initdb", lambda self: self._data.mkdir())
    place = deep(home)
    for _ in range(2):
        postgres = EmbeddedPostgres(place)
        postgres.prepare(print)
        (postgres._data / "PG_VERSION").touch()
        assert stat.S_IMODE(postgres._sockets.stat().st_mode) == 0o700


@as_root
def test_every_folder_that_is_opened_for_postgres_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmbeddedPostgres, "_initdb", lambda self: self._data.mkdir())
    home.chmod(0o700)
    home.parent.chmod(0o700)
    told: list[str] = []
    EmbeddedPostgres(home).prepare(told.append)
    assert [folder for folder in (home, home.parent) if not any(f"through {folder} " in line for line in told)] == []
    assert home.stat().st_mode & 0o005 == 0o001
    (home / "postgres" / "PG_VERSION").touch()
    again: list[str] = []
    EmbeddedPostgres(home).prepare(again.append)
    assert again == []
