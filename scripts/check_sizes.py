"""Fails when a source file is longer than a reader can hold: 600 lines, tests 800.

    python scripts/check_sizes.py [ROOT]

Code is what people read top to bottom; lock files, data and licences are not counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

LIMIT = 600
TEST_LIMIT = 800
SUFFIXES = {".py", ".sh", ".sql", ".j2", ".html", ".js", ".css", ".md", ".yaml", ".yml", ".toml"}
NAMES = {"Makefile", "Dockerfile"}
SKIPPED_FOLDERS = {"build", "dist", "node_modules", "__pycache__", "unsloth_compiled_cache"}
KEPT_HIDDEN = {".ci", ".github"}


def source_files(root: Path) -> Iterator[Path]:
    """Every source file below ``root``, hidden and generated folders left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if _is_source(name))
        for name in sorted(names):
            if Path(name).suffix in SUFFIXES or name.split(".")[0] in NAMES:
                yield Path(folder) / name


def _is_source(folder: str) -> bool:
    hidden = folder.startswith(".") and folder not in KEPT_HIDDEN
    return not (hidden or folder in SKIPPED_FOLDERS or folder.endswith(".egg-info"))


def too_long(root: Path) -> list[str]:
    """One line for each file over its limit: path, lines, limit."""
    faults = []
    for path in source_files(root):
        relative = path.relative_to(root)
        limit = TEST_LIMIT if relative.parts[0] == "tests" else LIMIT
        with path.open("rb") as file:
            lines = sum(1 for _ in file)
        if lines > limit:
            faults.append(f"{relative}: {lines} lines, the limit is {limit}; split it by subject")
    return faults


def main() -> int:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent).resolve()
    faults = too_long(root)
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
