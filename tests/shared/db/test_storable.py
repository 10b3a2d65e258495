"""What a stage may say is not always what Postgres can hold."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from parampara.db.models import Run
from parampara.db.session import transaction
from parampara.db.storable import storable

ODD = {"a\0b": ["x\0y", "half \ud800 pair", {"n": float("nan"), "m": float("-inf")}], "fine": "नमस्ते 🙏 \U0001f600", "n": 1.5, "t": True}


def test_whatever_comes_in_can_be_written(sessions: sessionmaker[Session]) -> None:
    value: dict[str, Any] = storable(ODD)
    with transaction(sessions) as session:
        session.add(Run(id="run_1", name=storable("n\0\udfff"), recipe=value, datasets={}))
    with transaction(sessions) as session:
        row = session.scalars(select(Run)).one()
        assert (row.name, row.recipe) == ("n", value)
    assert value == {"ab": ["xy", "half  pair", {"n": None, "m": None}], "fine": "नमस्ते 🙏 😀", "n": 1.5, "t": True}
