"""Runs migrations on the connection that :func:`parampara.db.migrate.upgrade` hands in."""

from __future__ import annotations

from alembic import context

from parampara.db.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True, compare_server_default=True)
with context.begin_transaction():
    context.run_migrations()
