"""Contracts that every Parampara service shares: settings, errors, schemas, database, queue protocol, storage."""

__version__ = "0.1.0"
