"""Pages as OpenAI's SDK walks them: newest first by default, ``after=<last_id>`` until ``has_more`` is false."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Select, select, tuple_
from sqlalchemy.orm import Session

from parampara.errors import NotFound
from parampara.schemas.api import Answer, Order, Page

Row = TypeVar("Row")
Item = TypeVar("Item", bound=Answer)


def page(
    session: Session,
    query: Select[Row],
    *,
    key: Any,
    created: Any,
    after: str | None,
    limit: int,
    order: Order,
    show: Callable[[Row], Item],
) -> Page[Item]:
    """One page of ``query``, ordered by the columns ``(created, key)``.

    Raises:
        NotFound: no object has the id ``after``.
    """
    if after is not None:
        # without the query's filter: the object may have left the list since the page before
        cursor = session.execute(select(created, key).where(key == after)).one_or_none()
        if cursor is None:
            raise NotFound(f"after: there is no object {after!r}.", param="after")
        place, bound = tuple_(created, key), tuple_(*cursor)
        query = query.where(place > bound if order == "asc" else place < bound)
    direction = (created.asc(), key.asc()) if order == "asc" else (created.desc(), key.desc())
    rows = list(session.scalars(query.order_by(*direction).limit(limit + 1)))
    data = [show(row) for row in rows[:limit]]
    return as_page(data, has_more=len(rows) > limit)


def as_page(data: list[Item], *, has_more: bool) -> Page[Item]:
    ids = [getattr(item, "id", None) for item in data]
    return Page(data=data, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None)
