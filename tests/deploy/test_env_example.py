"""``.env.example`` documents every setting with its real default, and nothing that does not exist."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from parampara.settings import Settings
from tests.deploy.conftest import Variable
from tests.deploy.deployment_files import ROOT, substitutions

_LINE = re.compile(r"^(?P<comment>#?)(?P<name>[A-Z][A-Z0-9_]*)=(?P<value>.*)$", re.MULTILINE)


def documented() -> dict[str, tuple[str, bool]]:
    """Variable to its value and whether the line is a comment."""
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    return {match["name"]: (match["value"], bool(match["comment"])) for match in _LINE.finditer(text)}


def test_every_setting_is_documented(variables: dict[str, Variable]) -> None:
    assert set(variables) - set(documented()) == set()


def test_no_setting_is_documented_that_does_not_exist(variables: dict[str, Variable]) -> None:
    assert {name for name in documented() if name.startswith("PARAMPARA_")} - set(variables) == set()


def test_documented_defaults_are_the_real_ones(variables: dict[str, Variable]) -> None:
    wrong = {}
    for name, variable in variables.items():
        value, commented = documented()[name]
        if commented and value != _as_text(variable.default):
            wrong[name] = f"documented {value!r}, real {_as_text(variable.default)!r}"
    assert wrong == {}


def test_each_setting_may_be_given_alone(variables: dict[str, Variable], monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without its port must keep the port's default."""
    for name in [name for name in os.environ if name.startswith("PARAMPARA_")]:
        monkeypatch.delenv(name)
    defaults = Settings().model_dump()
    for name, variable in variables.items():
        if variable.default is not None:
            with monkeypatch.context() as alone:
                alone.setenv(name, _as_text(variable.default))
                assert Settings().model_dump() == defaults, name


def test_copying_the_file_sets_only_what_has_no_default() -> None:
    set_lines = {name for name, (_, commented) in documented().items() if not commented}
    assert set_lines == {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "PARAMPARA_KEY_PEPPER"}
    assert all(documented()[name][0] == "" for name in set_lines), "an example password would become a real one"


def test_compose_variables_are_documented_and_documented_ones_are_used() -> None:
    used = {"OMP_NUM_THREADS", "COMPOSE_FILE", "COMPOSE_PROFILES"}
    for file in ("compose.yaml", "compose.gpu.yaml", "docker/monitoring/grafana.env"):
        used |= {name for name, _, _ in substitutions((ROOT / file).read_text(encoding="utf-8"))}
    known = {name for name in documented() if not name.startswith("PARAMPARA_")}
    assert known == {name for name in used if not name.startswith("PARAMPARA_")}


def test_documented_compose_defaults_are_the_real_ones() -> None:
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8") + (ROOT / "compose.gpu.yaml").read_text(encoding="utf-8")
    base = {}
    for name, operator, word in substitutions(text):
        if "-" in operator:
            base.setdefault(name, word)  # compose.yaml comes first: its limits are the documented ones
    wrong = {name: word for name, word in base.items() if name != "HF_CACHE_DIR" and documented()[name][0] != word}
    assert wrong == {}


def _as_text(value: Any) -> str:
    """A default as one writes it into the environment."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | dict):
        return json.dumps(value, separators=(",", ":"))
    return str(value) if isinstance(value, str | int | float | Path) else repr(value)
