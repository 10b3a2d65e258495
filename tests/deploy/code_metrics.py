"""The metrics that the code defines, read from its source: every ``Counter``, ``Gauge`` and ``Histogram`` of prometheus_client."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.deployment_files import ROOT

_KINDS = {"Counter", "Gauge", "Histogram"}


@dataclass(frozen=True)
class Series:
    """One time series name as Prometheus stores it; ``kind`` is ``counter`` for whatever only grows."""

    name: str
    kind: str
    labels: frozenset[str]
    metric: str
    """What the code calls it."""
    module: str = ""
    """Path of the file that defines it."""


def series_of_code() -> dict[str, Series]:
    return {series.name: series for path in _sources() for series in _of_file(path)}


def series_of(metric: str, kind: str, labels: Iterable[str], *, module: str = "") -> Iterator[Series]:
    """What one metric becomes: a counter ends in ``_total``, a histogram has three series."""
    own = frozenset(labels)
    if kind == "gauge":
        yield Series(metric, "gauge", own, metric, module)
    elif kind == "counter":
        yield Series(metric.removesuffix("_total") + "_total", "counter", own, metric, module)
    else:
        yield Series(f"{metric}_bucket", "counter", own | {"le"}, metric, module)
        yield Series(f"{metric}_sum", "counter", own, metric, module)
        yield Series(f"{metric}_count", "counter", own, metric, module)


def _sources() -> Iterator[Path]:
    for folder in (ROOT / "shared" / "src", *(ROOT / "services").glob("*/src")):
        yield from folder.rglob("*.py")


def _of_file(path: Path) -> Iterator[Series]:
    text = path.read_text(encoding="utf-8")
    if "prometheus_client" not in text:
        return
    tree = ast.parse(text)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "prometheus_client"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _KINDS & imported:
            labels = ast.literal_eval(node.args[2]) if len(node.args) > 2 else ()
            module = str(path.relative_to(ROOT))
            yield from series_of(ast.literal_eval(node.args[0]), node.func.id.lower(), labels, module=module)
