"""docs/api.md lists exactly the routes that the control plane and the gateway have, and the README calls only such."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import control_plane.routers
from gateway import health, models, openapi
from gateway.passthrough import PREFIXES
from gateway.vector_stores import routes as vector_stores
from tests.deploy.deployment_files import ROOT

_ROW = re.compile(r"^\| (?P<methods>(?:GET|POST|PUT|PATCH|DELETE)(?: \w+)*) \| `(?P<path>/v1/[^`]+)` \|", re.MULTILINE)
_PARAMETER = re.compile(r"\{\w+(?::\w+)?\}")


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    """``(method, path)`` of every route, parameters reduced to ``{}``."""
    names = [module.name for module in pkgutil.iter_modules(control_plane.routers.__path__)]
    routers = [importlib.import_module(f"control_plane.routers.{name}").router for name in names]
    found = {pair for router in [*routers, vector_stores.router, models.router, health.router] for pair in _of(router)}
    return found | {("POST", path) for path in openapi._TOKEN_PATHS}


def test_the_route_table_is_complete_and_true(routes: set[tuple[str, str]]) -> None:
    documented = set()
    for row in _ROW.finditer((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        documented |= {(method, _PARAMETER.sub("{}", row["path"])) for method in row["methods"].split()}
    assert documented == {(method, path) for method, path in routes if path.startswith("/v1/")}


def test_every_control_plane_route_is_reached_through_the_gateway(routes: set[tuple[str, str]]) -> None:
    own = ("/v1/chat", "/v1/completions", "/v1/embeddings", "/v1/models", "/v1/vector_stores")
    behind = {path for _, path in routes if path.startswith("/v1/") and not path.startswith(own)}
    assert {path for path in behind if not path.startswith(PREFIXES)} == set()


@pytest.mark.parametrize("document", ["README.md", "docs/operations.md", "docs/api.md", "docs/architecture.md", "docs/deploy.md"])
def test_documents_call_only_routes_that_exist(document: str, routes: set[tuple[str, str]]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    known = [re.compile(re.escape(path).replace(re.escape("{}"), r"[^/\s]+")) for path in {path for _, path in routes}]
    called = re.findall(r"(?:GET|POST|DELETE) (/v1/[\w{}/.-]*[\w}])", text) + [
        "/v1" + path for path in re.findall(r"\$BASE(/[\w./-]*[\w])", text)
    ]
    planned = {"/v1/fine_tuning", "/v1/uploads"}
    unknown = [path for path in called if path not in planned and not any(pattern.fullmatch(path.replace("...", "x")) for pattern in known)]
    assert unknown == []


def _of(router: Any) -> Iterator[tuple[str, str]]:
    for route in router.routes:
        for method in getattr(route, "methods", None) or ():
            if method != "HEAD":
                yield method, _PARAMETER.sub("{}", route.path)
