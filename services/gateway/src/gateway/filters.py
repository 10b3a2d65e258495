"""OpenAI's attribute filters as SQL over ``vector_store_files.attributes``; every value is a bound parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, Float, and_, case, cast, false, func, or_
from sqlalchemy.orm import InstrumentedAttribute

from parampara.db.models import VectorStoreFile
from parampara.errors import InvalidRequest

MAX_DEPTH = 8
MAX_TERMS = 64
_ORDERED: dict[str, Callable[[Any, Any], ColumnElement[bool]]] = {
    "gt": lambda left, right: left > right,
    "gte": lambda left, right: left >= right,
    "lt": lambda left, right: left < right,
    "lte": lambda left, right: left <= right,
}
_ATTRIBUTES: InstrumentedAttribute[dict[str, Any]] = VectorStoreFile.attributes


def compile_filter(value: Any, *, param: str = "filters") -> ColumnElement[bool]:
    """A condition on ``VectorStoreFile`` rows. A file without the attribute matches only ``ne`` and ``nin``.

    Raises:
        InvalidRequest: names the part at fault.
    """
    terms = [0]
    return _compile(value, param, depth=0, terms=terms)


def _compile(value: Any, where: str, *, depth: int, terms: list[int]) -> ColumnElement[bool]:
    terms[0] += 1
    if depth > MAX_DEPTH or terms[0] > MAX_TERMS:
        raise InvalidRequest(f"{where}: a filter may nest {MAX_DEPTH} deep and hold {MAX_TERMS} parts.", param=where)
    if not isinstance(value, dict):
        raise InvalidRequest(f"{where} must be an object.", param=where)
    kind = value.get("type")
    if kind in ("and", "or"):
        parts = value.get("filters")
        if not isinstance(parts, list) or not parts:
            raise InvalidRequest(f"{where}.filters must be a non-empty list.", param=f"{where}.filters")
        compiled = [_compile(part, f"{where}.filters[{number}]", depth=depth + 1, terms=terms) for number, part in enumerate(parts)]
        return and_(*compiled) if kind == "and" else or_(*compiled)
    return _comparison(kind, value.get("key"), value.get("value"), where)


def _comparison(kind: Any, key: Any, value: Any, where: str) -> ColumnElement[bool]:
    if not isinstance(key, str) or not 0 < len(key) <= 64:
        raise InvalidRequest(f"{where}.key must be a string of 1 to 64 characters.", param=f"{where}.key")
    if kind in ("in", "nin"):
        if not isinstance(value, list) or not value or len(value) > MAX_TERMS:
            raise InvalidRequest(f"{where}.value must be a list of 1 to {MAX_TERMS} values.", param=f"{where}.value")
        matches = or_(*(_equal(key, _scalar(item, where)) for item in value))
        return matches if kind == "in" else _negated(matches)
    scalar = _scalar(value, where)
    if kind == "eq":
        return _equal(key, scalar)
    if kind == "ne":
        return _negated(_equal(key, scalar))
    if kind not in _ORDERED:
        raise InvalidRequest(f"{where}.type must be eq, ne, gt, gte, lt, lte, in, nin, and or or.", param=f"{where}.type")
    return _ordered(_ORDERED[kind], key, scalar, where)


def _ordered(compare: Callable[[Any, Any], ColumnElement[bool]], key: str, value: Any, where: str) -> ColumnElement[bool]:
    if isinstance(value, bool):
        raise InvalidRequest(f"{where}.value must be a number or a string to be compared by order.", param=f"{where}.value")
    wanted = "string" if isinstance(value, str) else "number"
    same_type = func.jsonb_typeof(_ATTRIBUTES[key]) == wanted
    # CASE, not AND: only CASE promises that text which is no number is never cast
    ordered = _ATTRIBUTES[key].astext if wanted == "string" else cast(_ATTRIBUTES[key].astext, Float)
    return case((same_type, compare(ordered, value)), else_=false())


def _equal(key: str, value: Any) -> ColumnElement[bool]:
    return _ATTRIBUTES.contains({key: value})


def _negated(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return ~func.coalesce(condition, false())


def _scalar(value: Any, where: str) -> str | float | bool:
    if not isinstance(value, str | int | float | bool) or (isinstance(value, str) and len(value) > 512):
        raise InvalidRequest(f"{where}.value must be a string of at most 512 characters, a number or a boolean.", param=f"{where}.value")
    return value
