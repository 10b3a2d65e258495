"""Fixtures on a real container engine; without one, every test here says so and is skipped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.containers.stack import ROOT, Stack

IMAGES = ("control-plane", "gateway", "ingestor", "embedder", "trainer", "merger", "quantizer", "evaluator", "deployer", "model-server:cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.containers)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    """A container engine that answers and holds the project's images."""
    try:
        answer = subprocess.run(["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `docker` on this machine")
    if answer.returncode != 0:
        pytest.skip(f"no container engine answers: {answer.stderr.strip()[:200]}")
    for image in IMAGES:
        found = subprocess.run(["docker", "image", "inspect", f"parampara/{image}"], capture_output=True, check=False)
        assert found.returncode == 0, f"there is no image parampara/{image}: `docker compose build` first"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The example's books and questions, as the demo uploads them."""
    folder = tmp_path_factory.mktemp("kp")
    source = ROOT / "examples" / "kp"
    subprocess.run([sys.executable, str(source / "generate.py"), "--out", str(folder)], check=True, capture_output=True)
    return {"books": sorted((source / "books").glob("*.txt")), "qa": [folder / "train.jsonl"], "qa_validation": [folder / "heldout.jsonl"]}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole platform, healthy."""
    composed = Stack("parampara-test", port=free_port(), folder=tmp_path_factory.mktemp("stack"))
    try:
        composed.up()
        yield composed
    finally:
        composed.down()
