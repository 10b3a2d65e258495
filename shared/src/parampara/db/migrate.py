"""Brings a database to the newest schema: ``python -m parampara.db.migrate [URL]``; with ``--wait``, waits until another process has.

Safe to call from several processes at once: an advisory lock lets one of them migrate while the others wait, and they then
find nothing to do. A statement that cannot get its table lock within five seconds gives up instead of blocking traffic.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from parampara.db.models import Base
from parampara.settings import get_settings

LOCK_TIMEOUT = "5s"
_ADVISORY_LOCK = 0x70617261  # "para"
_SCRIPTS = Path(__file__).with_name("migrations")
_WAIT_SECONDS = 2.0


def upgrade(url: str, revision: str = "head") -> None:
    """Create the ``vector`` extension and apply every missing migration.

    Raises:
        sqlalchemy.exc.OperationalError: no connection, or a table lock was not granted within five seconds.
    """
    with _locked(url) as connection:
        connection.execute(text("CREATE EXTENSION IF NOT EXISTS vector"))
        connection.commit()
        command.upgrade(_config(connection), revision)
        connection.commit()
        if revision == "head":
            _adopt_events(connection)
            connection.commit()


def downgrade(url: str, revision: str) -> None:
    """Undo migrations down to ``revision`` (``base``: all of them). Data in dropped tables is lost."""
    with _locked(url) as connection:
        command.downgrade(_config(connection), revision)
        connection.commit()


def missing(url: str) -> str | None:
    """Why code of this version cannot work on the database yet; None once it can.

    A revision that this version does not know is a newer one: it never keeps anybody waiting.
    """
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    try:
        with engine.connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
    except SQLAlchemyError as error:
        return f"the database does not answer: {str(error).splitlines()[0]}"
    scripts = ScriptDirectory(str(_SCRIPTS))
    older = {script.revision for script in scripts.walk_revisions()} - {scripts.get_current_head()}
    if revision is None or revision in older:
        return f"the schema is at {revision}, {scripts.get_current_head()} is needed"
    return None


def drift(connection: Connection) -> list[object]:
    """What ``Base.metadata`` has that the database has not, and the other way round; empty when they agree."""
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
    return list(compare_metadata(context, Base.metadata))


@contextmanager
def _locked(url: str) -> Iterator[Connection]:
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 5})
    with engine.connect() as connection:
        # the advisory lock belongs to the connection and goes with it
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _ADVISORY_LOCK})
        connection.execute(text(f"SET lock_timeout = '{LOCK_TIMEOUT}'"))
        connection.commit()
        yield connection


def _adopt_events(connection: Connection) -> None:
    """Events restored from a dump carry numbers of another cluster's transactions, which may lie in this one's future.

    Readers of the stream would wait for those, so all are put before whatever comes, in the order of their ids.
    """
    connection.execute(
        text(
            "UPDATE events SET xid = 0 WHERE EXISTS "
            "(SELECT 1 FROM events WHERE xid >= (pg_snapshot_xmax(pg_current_snapshot())::text)::bigint)"
        )
    )


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m parampara.db.migrate", description="Bring the database to the newest schema.")
    parser.add_argument("url", nargs="?", help="the database (PARAMPARA_DATABASE__URL)")
    parser.add_argument("--wait", action="store_true", help="change nothing: return once another process has brought the schema up to date")
    given = parser.parse_args(arguments)
    url = given.url or get_settings().database.url
    if not given.wait:
        try:
            upgrade(url)
        except OperationalError as error:
            print(f"cannot migrate: {error.orig}; is PARAMPARA_DATABASE__URL right?", file=sys.stderr)
            return 1
        return 0
    told = None
    while (reason := missing(url)) is not None:
        if reason != told:
            print(f"waiting: {reason}", file=sys.stderr, flush=True)
            told = reason
        time.sleep(_WAIT_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
