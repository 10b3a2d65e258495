"""From the output directory of a finished stage to a published artifact, and away with what is no longer needed."""

from __future__ import annotations

import errno
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parampara.execution.inputs import Resolved
from parampara.manifest import Manifest
from parampara.plan import ARTIFACT_KINDS
from parampara.schemas.stages import Kind
from parampara.storage import LocalStorage

_IN_MANIFEST = ("kind", "params", "seed", "backend", "gates")


@dataclass(frozen=True)
class Product:
    result: dict[str, Any]
    manifest: Manifest | None
    output: Path | None
    """The stage's output where it is not an artifact."""


def publish(storage: LocalStorage, kind: Kind, resolved: Resolved, workdir: Path, result: dict[str, Any]) -> Product:
    """Make the output an artifact (stages that have one) and check it in the store.

    Raises:
        InvalidData: the output is empty or holds something else than plain files.
        ArtifactDamaged: the store holds other bytes than the stage wrote.
        OSError: the disk is full and the like; nothing is published then.
    """
    told = {key: value for key, value in result.items() if key != "output"}  # a path of this machine
    output = workdir / "output"
    artifact_kind = ARTIFACT_KINDS[kind]
    if artifact_kind is None:
        return Product(told, None, output if output.is_dir() else None)
    config = {key: value for key, value in resolved.config.model_dump(mode="json").items() if key in _IN_MANIFEST}
    versions = result.get("library_versions") or {}
    manifest = storage.publish(output, kind=artifact_kind, parents=resolved.parents, config=config, versions=versions, move=True)
    storage.verify(manifest.id, deep=False)
    return Product(told, manifest, None)


def clean(workdir: Path) -> None:
    """Remove checkpoints and other directories of a finished job; its small files (progress, logs, result) stay."""
    for path in workdir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def disk_error(error: OSError, what: str) -> dict[str, Any]:
    """An OSError as a job's error, with what to do about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = "Free disk space and retry the job." if full else "Check the disk and its permissions, then retry the job."
    return {"code": "disk_full" if full else "storage_failed", "message": f"{what}: {error.strerror or error}. {advice}"}
