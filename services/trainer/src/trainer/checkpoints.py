"""Checkpoints that are whole or absent, and verified before use.

A checkpoint is written into a stage directory on the same file system, fsynced, given a ``MANIFEST.json`` (sha256 and size
of every file, the step, and the *facts*: everything that must be equal for a resume to be exact, with a hash over all of
this), and renamed into place. A kill at any moment, a full disk or a flipped bit leaves the one before it in use.
"""

from __future__ import annotations

import hashlib
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
    """The checkpoints of one job below ``root``; keeps the newest ``keep`` and the best.

    ``facts`` is JSON data; a checkpoint made under other facts is never used.
    """

    def __init__(self, root: Path, *, facts: dict[str, Any], keep: int) -> None:
        self.root, self.keep = root, keep
        self.facts = json.loads(json.dumps(facts))  # as a manifest gives them back
        root.mkdir(parents=True, exist_ok=True)
        fsync_directory(root.parent)
        for leftover in root.glob(f"{_STAGE}*"):  # of a process that died while it saved
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, write: Callable[[Path], None], *, best: int | None = None) -> Checkpoint:
        """Let ``write`` fill a directory and make that directory the checkpoint of ``step``; ``best`` is a step to keep as well.

        A usable checkpoint of this step stays as it is: training is exact, so the new one would hold the same, and to put one
        in the place of another there would be a moment with neither.

        Raises:
            Whatever ``write`` raises, and OSError when the disk is full; no trace is left then.
        """
        final = self._path(step)
        if final.exists() and self._fault(final) is None:
            return Checkpoint(path=final, step=step)
        stage, aside = (self.root / f"{_STAGE}{uuid.uuid4().hex}" for _ in range(2))
        try:
            stage.mkdir()
            write(stage)
            (stage / MANIFEST).write_bytes(_sealed(self._manifest(stage, step)))
            fsync_tree(stage)
            if final.exists():  # damaged, or of another configuration
                os.rename(final, aside)
            os.rename(stage, final)
            fsync_directory(self.root)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            shutil.rmtree(aside, ignore_errors=True)
        self._rotate(best)
        return Checkpoint(path=final, step=step)

    def at(self, step: int) -> Checkpoint | None:
        """The checkpoint of one step, if it is there and verifies."""
        path = self._path(step)
        return Checkpoint(path=path, step=step) if self._fault(path) is None else None

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
        return {"format": 2, "step": step, "facts": self.facts, "files": files}

    def _fault(self, path: Path) -> str | None:
        """Why this checkpoint can not be used, or None."""
        try:
            data = (path / MANIFEST).read_bytes()
            manifest = json.loads(data)
            del manifest["sha256"]
            if _sealed(manifest) != data:
                return f"{MANIFEST} was changed"
            if manifest["facts"] != self.facts:
                others = ", ".join(_differences(manifest["facts"], self.facts))
                return f"made with another configuration, data, base model or library version ({others})"
            if manifest["step"] != _step(path):
                return f"says it is step {manifest['step']}"
            present = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} - {MANIFEST}
            if present != set(manifest["files"]):
                return f"files differ from the manifest: {sorted(present ^ set(manifest['files']))[:3]}"
            for name, entry in manifest["files"].items():
                if (path / name).stat().st_size != entry["size"] or sha256_file(path / name) != entry["sha256"]:
                    return f"{name} differs from its sha256"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"its manifest can not be read ({type(error).__name__}: {error})"
        return None

    def _path(self, step: int) -> Path:
        return self.root / f"{_PREFIX}{step:010d}"

    def _paths(self) -> list[Path]:
        return sorted(
            (p for p in self.root.glob(f"{_PREFIX}*") if p.is_dir() and p.name[len(_PREFIX) :].isdigit()), key=_step, reverse=True
        )

    def _rotate(self, best: int | None) -> None:
        """Keep the newest ``keep`` usable ones and the best; a damaged or foreign one never counts, and goes once enough others exist."""
        usable = 0
        for path in self._paths():
            if usable >= self.keep and _step(path) != best:
                shutil.rmtree(path, ignore_errors=True)
            elif usable < self.keep and self._fault(path) is None:
                usable += 1


def _step(path: Path) -> int:
    return int(path.name[len(_PREFIX) :])


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The one form in which a manifest is written, with a hash of itself: no bit of it changes unseen."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True).encode()


def _differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Names of the facts that differ, such as ``settings.params.train.learning_rate``."""
    if not isinstance(saved, dict) or not isinstance(wanted, dict):
        return [] if saved == wanted else [name]
    keys = sorted(set(saved) | set(wanted))
    return [found for key in keys for found in _differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else key)]
