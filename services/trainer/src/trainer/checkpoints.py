"""Checkpoints that are whole or absent, and verified before use.

A checkpoint is written into a stage directory on the same file system, fsynced, given a ``MANIFEST.json`` (sha256 and size
of every file, the step, and the *key*: a hash over everything that must be equal for a resume to be exact), and renamed
into place. A kill at any moment, a full disk or a flipped bit leaves the one before it in use.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parampara.manifest import regular_files, sha256_file
from parampara.storage import fsync_directory, fsync_tree

MANIFEST = "MANIFEST.json"
_PREFIX = "step-"
_STAGE = ".stage-"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int


class CheckpointStore:
    """The checkpoints of one job below ``root``; keeps the newest ``keep``."""

    def __init__(self, root: Path, *, key: str, keep: int) -> None:
        self.root, self.key, self.keep = root, key, keep
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(f"{_STAGE}*"):  # of a process that died while it saved
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, write: Callable[[Path], None]) -> Checkpoint:
        """Let ``write`` fill a directory and make that directory the checkpoint of ``step``.

        Raises:
            Whatever ``write`` raises, and OSError when the disk is full; no trace is left then.
        """
        final = self.root / f"{_PREFIX}{step:010d}"
        stage = self.root / f"{_STAGE}{uuid.uuid4().hex}"
        stage.mkdir()
        try:
            write(stage)
            (stage / MANIFEST).write_text(json.dumps(self._manifest(stage, step), indent=1, sort_keys=True), encoding="utf-8")
            fsync_tree(stage)
            if final.exists():  # saved by an earlier attempt that was killed later in the same step
                shutil.rmtree(final)
            os.rename(stage, final)
            fsync_directory(self.root)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        self._rotate()
        return Checkpoint(path=final, step=step)

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and for each newer one the reason why it was passed over."""
        skipped: list[str] = []
        for path in self._paths():
            fault = self._fault(path)
            if fault is None:
                return Checkpoint(path=path, step=_step(path)), skipped
            skipped.append(f"{path.name}: {fault}")
        return None, skipped

    def _manifest(self, stage: Path, step: int) -> dict[str, Any]:
        files = {
            path.relative_to(stage).as_posix(): {"size": path.stat().st_size, "sha256": sha256_file(path)} for path in regular_files(stage)
        }
        return {"format": 1, "step": step, "key": self.key, "files": files}

    def _fault(self, path: Path) -> str | None:
        """Why this checkpoint can not be used, or None."""
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            listed, key, step = manifest["files"], manifest["key"], manifest["step"]
            if key != self.key:
                return "made with another configuration, data, base model or library version"
            if step != _step(path):
                return f"says it is step {step}"
            present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {MANIFEST}
            if present != set(listed):
                return f"files differ from the manifest: {sorted(present ^ set(listed))[:3]}"
            for name, entry in listed.items():
                if (path / name).stat().st_size != entry["size"] or sha256_file(path / name) != entry["sha256"]:
                    return f"{name} differs from its sha256"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"its manifest can not be read ({type(error).__name__}: {error})"
        return None

    def _paths(self) -> list[Path]:
        return sorted(
            (p for p in self.root.glob(f"{_PREFIX}*") if p.is_dir() and p.name[len(_PREFIX) :].isdigit()), key=_step, reverse=True
        )

    def _rotate(self) -> None:
        """Keep the newest ``keep`` usable ones; a damaged or foreign one never counts, and goes once enough others exist."""
        usable = 0
        for path in self._paths():
            if usable >= self.keep:
                shutil.rmtree(path, ignore_errors=True)
            elif self._fault(path) is None:
                usable += 1


def _step(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])
