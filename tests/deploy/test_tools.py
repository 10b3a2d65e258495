"""The checks check: file sizes, CI entry point, pinned actions, and every service under every rule."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.deployment_files import ROOT

SERVICES = {path.parent.name for path in (ROOT / "services").glob("*/pyproject.toml")}


@pytest.fixture(scope="module")
def tools() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]


def check_sizes(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_sizes.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def lines(path: Path, count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("pass\n" * count, encoding="utf-8")


def test_files_at_their_limit_pass(tmp_path: Path) -> None:
    lines(tmp_path / "services" / "a" / "at_limit.py", 600)
    lines(tmp_path / "tests" / "test_at_limit.py", 800)
    lines(tmp_path / ".venv" / "library.py", 9000)
    lines(tmp_path / "data.jsonl", 9000)
    assert check_sizes(tmp_path).returncode == 0


@pytest.mark.parametrize(("name", "count"), [("services/a/long.py", 601), ("tests/test_long.py", 801), (".ci/long.sh", 601)])
def test_a_file_over_its_limit_is_named(tmp_path: Path, name: str, count: int) -> None:
    lines(tmp_path / name, count)
    outcome = check_sizes(tmp_path)
    assert outcome.returncode == 1
    assert f"{name}: {count} lines" in outcome.stderr


def test_ci_runs_what_a_person_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert any(step.get("run") == ".ci/run" for step in workflow["jobs"]["test"]["steps"])
    assert workflow["permissions"] == {"contents": "read"}


def test_ci_tests_the_composed_stack_where_an_engine_runs() -> None:
    script = ROOT / ".ci" / "containers"
    assert os.access(script, os.X_OK)
    assert ".ci/containers" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    nowhere = {"PATH": "/nonexistent", "HOME": "/nonexistent"}
    alone = subprocess.run(["/bin/bash", "-c", "docker() { return 1; }; id() { echo 1000; }; dirname() { echo .; }; . ../.ci/containers"],
                           cwd=ROOT / "tests", env=nowhere, capture_output=True, text=True, check=False)  # fmt: skip
    assert (alone.returncode, alone.stdout.strip()) == (0, "containers: skipped, no container engine answers here"), alone.stderr


def test_actions_are_pinned_by_commit() -> None:
    uses = re.findall(r"uses: (\S+)", (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert uses
    assert [use for use in uses if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", use)] == []


def test_every_service_is_under_the_import_rules(tools: dict[str, Any]) -> None:
    rules = tools["importlinter"]
    assert set(rules["root_packages"]) == SERVICES | {"parampara"}
    by_name = {contract["name"]: contract for contract in rules["contracts"]}
    assert set(by_name["Services never import each other"]["modules"]) == SERVICES
    assert set(by_name["Imports point one way: services import shared"]["forbidden_modules"]) == SERVICES


def test_every_service_is_type_checked_and_sorted(tools: dict[str, Any]) -> None:
    assert {f"services/{service}/src" for service in SERVICES} <= set(tools["pyright"]["extraPaths"])
    assert set(tools["ruff"]["lint"]["isort"]["known-first-party"]) >= SERVICES | {"parampara"}


def test_the_licence_is_the_whole_apache_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    for path in [ROOT / "shared", *(ROOT / "services" / service for service in SERVICES)]:
        assert tomllib.loads((path / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"] == "Apache-2.0"


def test_relative_links_in_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *(path for folder in ("docs", "bench", "docker", "k8s") for path in (ROOT / folder).rglob("*.md"))]
    broken = []
    for document in documents:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []
