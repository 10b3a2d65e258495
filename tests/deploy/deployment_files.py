"""Reading compose files and Dockerfiles the way Docker does, as far as the tests need it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
_VARIABLE = re.compile(r"(?<!\$)\$\{(?P<name>\w+)(?:(?P<operator>:?[-?])(?P<word>[^{}]*))?\}")


def substitutions(text: str) -> Iterator[tuple[str, str, str]]:
    """``(variable, operator, word)`` of every ``${...}`` in a compose file."""
    for match in _VARIABLE.finditer(text):
        yield match["name"], match["operator"] or "", match["word"] or ""


def substituted(text: str, values: dict[str, str]) -> str:
    """``text`` with compose's substitution: ``values``, else the default that stands behind ``:-`` or ``-``."""
    return _VARIABLE.sub(lambda match: values.get(match["name"]) or (match["word"] or "" if "-" in (match["operator"] or "") else ""), text)


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """``(INSTRUCTION, rest)`` of a Dockerfile, continued lines joined and comments dropped."""
    lines = [line for line in dockerfile.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def script(name: str) -> ModuleType:
    """``scripts/<name>.py`` as a module."""
    spec = importlib.util.spec_from_file_location(f"parampara_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
