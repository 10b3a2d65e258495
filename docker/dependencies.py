"""Prints what the given packages depend on, so that an image gets its libraries in a layer that code changes do not touch.

    python dependencies.py shared services/gateway > requirements.txt

Parampara's own packages are left out: they are installed from source, without dependencies, in a later layer.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def dependencies(folders: list[Path]) -> list[str]:
    """The union of ``project.dependencies`` of ``<folder>/pyproject.toml``, sorted."""
    found: set[str] = set()
    for folder in folders:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        found.update(name for name in project["dependencies"] if not name.startswith("parampara-"))
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(dependencies([Path(argument) for argument in sys.argv[1:]])))
