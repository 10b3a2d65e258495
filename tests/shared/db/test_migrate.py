"""The migrations make exactly the tables that the models describe."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from parampara.db import migrate
from parampara.db.models import Event, Run


def test_models_and_migrations_agree(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        assert migrate.drift(session.connection()) == []


def test_drift_is_noticed(sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch) -> None:
    with sessions() as session:
        session.execute(text("ALTER TABLE runs DROP COLUMN gate"))
        found = migrate.drift(session.connection())
    assert len(found) == 1 and "gate" in repr(found[0])


def test_several_processes_may_migrate_at_once(postgres, database_url: str) -> None:
    with create_engine(database_url).connect() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
        connection.commit()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda _: migrate.upgrade(database_url), range(3)))
        assert connection.execute(text("SELECT count(*) FROM alembic_version")).scalar_one() == 1
        assert migrate.drift(connection) == []


def test_a_new_column_waits_at_most_five_seconds_for_its_lock(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT", "200ms")
    plain = database_url.replace("+psycopg", "")
    with psycopg.connect(plain) as blocker:
        blocker.execute("UPDATE alembic_version SET version_num = version_num")
        blocker.commit()
        blocker.execute("LOCK TABLE runs IN ACCESS SHARE MODE")
        with pytest.raises(OperationalError, match="lock timeout"):
            migrate.downgrade(database_url, "base")


def test_what_is_missing_is_told_until_the_schema_is_there(database_url: str) -> None:
    assert migrate.missing(database_url) is None
    migrate.downgrade(database_url, "base")
    assert "the schema is at None" in str(migrate.missing(database_url))
    assert "does not answer" in str(migrate.missing("postgresql+psycopg://x@127.0.0.1:9/x"))


def test_a_database_that_refuses_is_told_with_the_setting(capsys) -> None:
    assert migrate.main(["postgresql+psycopg://x:secret@127.0.0.1:9/x"]) == 1
    said = capsys.readouterr().err
    assert "PARAMPARA_DATABASE__URL" in said
    assert "secret" not in said


def test_a_newer_schema_keeps_nobody_waiting(database_url: str) -> None:
    """An older version that is started again while a newer one is rolled out works on instead of waiting for ever."""
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert migrate.missing(database_url) is None


def test_waiting_ends_when_another_process_has_migrated(database_url: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(migrate, "_WAIT_SECONDS", 0.02)
    migrate.downgrade(database_url, "base")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(migrate.main, ["--wait", database_url])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.3)
        migrate.upgrade(database_url)
        assert waiting.result(timeout=10) == 0
    assert capsys.readouterr().err.count("the schema is at None") == 1, "said once, not every two seconds"


def test_restored_events_come_before_all_that_follow(database_url: str, sessions: sessionmaker[Session]) -> None:
    """A dump carries numbers of another cluster's transactions."""
    with sessions() as session, session.begin():
        session.add_all([Event(type="message", message=str(number), xid=xid) for number, xid in enumerate([10**15, 5, 10**15 + 7])])
    migrate.upgrade(database_url)
    migrate.upgrade(database_url)
    with sessions() as session, session.begin():
        session.add(Event(type="message", message="3"))
    with sessions() as session:
        assert session.scalars(select(Event.message).order_by(Event.xid, Event.id)).all() == ["0", "1", "2", "3"]


def test_events_of_the_first_schema_keep_their_order(postgres, sessions: sessionmaker[Session], database_url: str) -> None:
    migrate.downgrade(database_url, "0001")
    with sessions() as session, session.begin():
        session.execute(text("INSERT INTO events (type, message) VALUES ('message', 'a'), ('message', 'b')"))
    migrate.upgrade(database_url)
    with sessions() as session, session.begin():
        session.add(Event(type="message", message="c"))
    with sessions() as session:
        assert session.scalars(select(Event.message).order_by(Event.xid, Event.id)).all() == ["a", "b", "c"]
        assert migrate.drift(session.connection()) == []


def test_null_json_is_sql_null(sessions: sessionmaker[Session]) -> None:
    with sessions() as session, session.begin():
        session.add(Run(id="run_1", name="n", recipe={}, datasets={}, error=None))
        session.flush()
        assert session.execute(text("SELECT error IS NULL FROM runs")).scalar_one() is True
