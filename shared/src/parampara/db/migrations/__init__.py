"""Alembic migrations; applied by :mod:`parampara.db.migrate`."""
