"""Follows labels through a PromQL expression: which ones each part has, and whether the parts fit together.

Prometheus itself answers an expression over a label that does not exist, or a comparison of series that never match, with
nothing and without a word: an alert that never fires. Here both are faults.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser as promql

from tests.deploy.code_metrics import Series

Labels = frozenset[str]
_NEED_COUNTERS = {"rate", "irate", "increase"}
_ONLY_EXISTENCE = {"and", "unless", "or"}


class Misfit(ValueError):
    """An expression that can never answer what it is meant to."""


def labels_of(expression: str, known: Mapping[str, Series]) -> Labels:
    """Labels of the series that ``expression`` gives.

    Raises:
        Misfit: unknown series or label, ``rate`` of something that does not only grow, sides that cannot match.
        ValueError: not PromQL.
    """
    return _labels(promql.parse(expression), known)


def selectors(expression: str) -> Iterator[Any]:
    """Every vector selector in it; each has ``name`` and ``matchers.matchers``."""
    yield from _selectors(promql.parse(expression))


def _labels(node: Any, known: Mapping[str, Series]) -> Labels:
    match node:
        case promql.VectorSelector():
            return _of_selector(node, known).labels
        case promql.MatrixSelector():
            return _of_selector(node.vector_selector, known).labels
        case promql.AggregateExpr():
            return _of_aggregation(node, known)
        case promql.BinaryExpr():
            return _of_operation(node, known)
        case promql.Call():
            return _of_call(node, known)
        case promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            return _labels(node.expr, known)
    return frozenset()


def _of_selector(node: Any, known: Mapping[str, Series]) -> Series:
    if node.name not in known:
        raise Misfit(f"there is no series {node.name}")
    series = known[node.name]
    _require({matcher.name for matcher in node.matchers.matchers}, series.labels, f"{node.name}{{}}")
    return series


def _of_aggregation(node: Any, known: Mapping[str, Series]) -> Labels:
    inner = _labels(node.expr, known)
    if node.modifier is None:
        return frozenset()
    named = frozenset(node.modifier.labels)
    _require(named, inner, f"{node.modifier.type} of an aggregation")
    return named if node.modifier.type == promql.AggModifierType.By else inner - named


def _of_operation(node: Any, known: Mapping[str, Series]) -> Labels:
    left, right = _labels(node.lhs, known), _labels(node.rhs, known)
    if _is_scalar(node.lhs) or _is_scalar(node.rhs):
        return left or right
    operator = str(node.op)
    matching = node.modifier.matching if node.modifier else None
    if operator == "or":
        return left | right
    if matching is None:
        if left != right:
            raise Misfit(f"the sides of {operator!r} have the labels {sorted(left)} and {sorted(right)}: no pair is equal in all of them")
        return left
    named = frozenset(matching.labels)
    _require(named, left, f"left side of {operator!r}")
    _require(named, right, f"right side of {operator!r}")
    if operator in _ONLY_EXISTENCE or node.modifier.card != promql.VectorMatchCardinality.OneToOne:
        return left | frozenset(node.modifier.group_labels or ())
    return named


def _of_call(node: Any, known: Mapping[str, Series]) -> Labels:
    name = node.func.name
    vectors = [argument for argument in node.args if not _is_scalar(argument) and not isinstance(argument, promql.StringLiteral)]
    inner = _labels(vectors[0], known) if vectors else frozenset()
    if name in _NEED_COUNTERS and known[vectors[0].vector_selector.name].kind != "counter":
        raise Misfit(f"{name}() of {vectors[0].vector_selector.name}, which does not only grow")
    if name == "histogram_quantile":
        _require({"le"}, inner, name)
        return inner - {"le"}
    if name == "label_replace":
        _, target, _, source, _ = node.args
        _require({source.val}, inner, name)
        return inner | {target.val}
    return inner


def _require(wanted: Any, there: Labels, place: str) -> None:
    if missing := set(wanted) - there:
        raise Misfit(f"{place}: no label {', '.join(sorted(missing))}; there are {', '.join(sorted(there)) or 'none'}")


def _is_scalar(node: Any) -> bool:
    if isinstance(node, promql.ParenExpr | promql.UnaryExpr):
        return _is_scalar(node.expr)
    if isinstance(node, promql.BinaryExpr):
        return _is_scalar(node.lhs) and _is_scalar(node.rhs)
    return isinstance(node, promql.NumberLiteral)


def _selectors(node: Any) -> Iterator[Any]:
    match node:
        case promql.VectorSelector():
            yield node
        case promql.MatrixSelector():
            yield node.vector_selector
        case promql.BinaryExpr():
            yield from _selectors(node.lhs)
            yield from _selectors(node.rhs)
        case promql.Call():
            for argument in node.args:
                yield from _selectors(argument)
        case promql.AggregateExpr() | promql.ParenExpr() | promql.UnaryExpr() | promql.SubqueryExpr():
            yield from _selectors(node.expr)
