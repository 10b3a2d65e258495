"""``/docs`` shows the documentation where nothing outside can be reached, on every HTTP service."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy.orm import Session, sessionmaker

from control_plane.app import create_app as create_control_plane
from embedder.app import create_app as create_embedder
from model_server.app import create_app as create_model_server
from parampara.http import DOCS_PATHS
from parampara.settings import Settings

INTERNAL: dict[str, Callable[[Settings], FastAPI]] = {"embedder": create_embedder, "model_server": create_model_server}


def check(client: httpx.Client) -> None:
    """Everything the page names comes from the server itself, and is there."""
    page = client.get("/docs")
    assert page.status_code == 200
    assert re.findall(r"""["'](https?://[^"']+)["']""", page.text) == []
    named = re.findall(r"""(?:src|href)=["']([^"']+)["']""", page.text)
    assert {path for path in named if not path.startswith("data:")} <= DOCS_PATHS
    types = {}
    for path in DOCS_PATHS:
        answer = client.get(path)
        assert answer.status_code == 200, path
        types[path.rpartition(".")[2]] = answer.headers["content-type"].partition(";")[0]
    assert types["css"] == "text/css"
    assert types["js"] == "text/javascript"
    assert "url: '/openapi.json'" in page.text


@pytest.mark.parametrize("service", INTERNAL)
def test_of_internal_services(service: str, tmp_path: Path) -> None:
    check(TestClient(INTERNAL[service](Settings(home=tmp_path))))


def test_of_the_control_plane_without_a_key(settings: Settings, sessions: sessionmaker[Session]) -> None:
    check(TestClient(create_control_plane(settings, sessions)))
