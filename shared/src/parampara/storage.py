"""Artifact storage: immutable directories under one root, published atomically.

``publish`` copies (or moves) a finished directory aside on the store's own file system, writes its manifest, fsyncs and
renames. A reader sees the whole artifact or none of it; publishing the same content twice gives the same id and keeps one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from parampara.errors import ArtifactDamaged, NotFound
from parampara.manifest import MANIFEST_NAME, Manifest, describe, verify
from parampara.schemas.stages import ArtifactKind

_ABANDONED_SECONDS = 24 * 3600.0


class LocalStorage:
    """Artifacts in ``root/<first two hex>/<hex>/``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / "staging"
        self._staging.mkdir(parents=True, exist_ok=True)

    def publish(
        self,
        directory: Path,
        *,
        kind: ArtifactKind,
        parents: list[str] | None = None,
        config: dict[str, Any] | None = None,
        versions: dict[str, str] | None = None,
        move: bool = False,
    ) -> Manifest:
        """Make ``directory`` an artifact and return its manifest; with ``move`` the source is consumed.

        Raises:
            InvalidData: empty directory, or a link or special file in it.
            OSError: disk full and the like; nothing is published then.
        """
        stage = self._staging / uuid.uuid4().hex
        try:
            if not (move and _moved(directory, stage)):
                _copy_tree(directory, stage)
            manifest = describe(stage, kind=kind, parents=parents or [], config=config or {}, versions=versions or {})
            (stage / MANIFEST_NAME).write_bytes(manifest.canonical_bytes())
            fsync_tree(stage)
            target = self._path(manifest.id)
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync_directory(self.root)
            self._set_aside_if_damaged(manifest)
            if not target.exists():
                try:
                    os.rename(stage, target)
                except OSError:
                    if not target.exists():  # lost the race to an equal publisher: same id means same bytes
                        raise
            fsync_directory(target.parent)
            return manifest
        finally:
            shutil.rmtree(stage, ignore_errors=True)

    def path(self, artifact_id: str) -> Path:
        """Local directory of an artifact.

        Raises:
            NotFound: no such artifact here.
        """
        target = self._path(artifact_id)
        if not (target / MANIFEST_NAME).is_file():
            raise NotFound(f"Artifact {artifact_id} is not in the store.", param="artifact_id")
        return target

    def manifest(self, artifact_id: str) -> Manifest:
        """Read a manifest and check that it is the one the id names.

        Raises:
            NotFound, ArtifactDamaged
        """
        try:
            manifest = Manifest.model_validate_json((self.path(artifact_id) / MANIFEST_NAME).read_bytes())
        except ValueError:
            raise ArtifactDamaged(f"The manifest of {artifact_id} is not a manifest any more.", param="artifact_id") from None
        if manifest.id != artifact_id:
            raise ArtifactDamaged(f"The manifest of {artifact_id} was changed.", param="artifact_id")
        return manifest

    def verify(self, artifact_id: str, *, deep: bool = True, cache: Path | None = None) -> Path:
        """Return the directory after checking its files against the manifest, with ``deep`` their bytes too.

        Hashing a 16 GB model takes a minute: with ``cache`` (a directory) that is done once for given sizes, times of
        change and inodes. A byte that a failing disk turns over after that is not noticed; one that was written is.

        Raises:
            NotFound, ArtifactDamaged
        """
        directory, manifest = self.path(artifact_id), self.manifest(artifact_id)
        if cache is None:
            verify(directory, manifest, deep=deep)
            return directory
        seen, state = cache / artifact_id.replace(":", "-"), _state_of(directory, manifest)
        known = seen.is_file() and seen.read_bytes() == state
        verify(directory, manifest, deep=deep and not known)
        if deep and not known:
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(seen, state)
        return directory

    def delete(self, artifact_id: str) -> None:
        shutil.rmtree(self._path(artifact_id), ignore_errors=True)

    def sweep(self, *, older_than_seconds: float = _ABANDONED_SECONDS) -> list[Path]:
        """Remove what publishers that were killed left aside; returns the directories. The age keeps those alive safe."""
        old = [path for path in self._staging.iterdir() if _age(path) > older_than_seconds]
        for path in old:
            shutil.rmtree(path, ignore_errors=True)
        return old

    def _set_aside_if_damaged(self, manifest: Manifest) -> None:
        """Make room for an equal artifact whose stored copy has rotted: publishing it again heals the store."""
        target = self._path(manifest.id)
        if not target.exists():
            return
        try:
            self.verify(manifest.id)
        except (ArtifactDamaged, NotFound):
            rotten = self._staging / uuid.uuid4().hex
            os.rename(target, rotten)
            shutil.rmtree(rotten, ignore_errors=True)

    def _path(self, artifact_id: str) -> Path:
        algorithm, _, digest = artifact_id.partition(":")
        if algorithm != "sha256" or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise NotFound(f"{artifact_id!r} is not an artifact id (sha256:<64 hex digits>).", param="artifact_id")
        return self.root / digest[:2] / digest


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_tree(directory: Path) -> None:
    for root, _, names in os.walk(directory):
        for name in names:
            fsync_file(Path(root) / name)
        fsync_directory(Path(root))


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _state_of(directory: Path, manifest: Manifest) -> bytes:
    """Changes whenever a listed file is written or replaced, even by one of equal size and time of modification."""
    stats = [(entry.path, path.lstat()) for entry in manifest.files if os.path.lexists(path := directory / entry.path)]
    told = [[str(directory)], *([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for name, stat in stats)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest().encode()


def _age(path: Path) -> float:
    """Seconds since a directory was renamed to its place or an entry was made in it."""
    try:
        return time.time() - path.lstat().st_ctime
    except FileNotFoundError:  # published meanwhile
        return 0.0


def _copy_tree(source: Path, target: Path) -> None:
    """Copy a directory.

    Raises:
        OSError: the first one met, with its number: `shutil` would make one text of all, and a full disk would have no name.
    """
    met: list[OSError] = []

    def copy(one: str, other: str) -> str:
        try:
            return shutil.copy2(one, other)
        except OSError as error:
            met.append(error)
            raise

    try:
        shutil.copytree(source, target, symlinks=True, copy_function=copy)
    except shutil.Error as error:
        raise (met[0] if met else error) from None


def _moved(source: Path, target: Path) -> bool:
    """Rename where that is possible. Two mounts count as two devices even when they lie on one file system."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True
