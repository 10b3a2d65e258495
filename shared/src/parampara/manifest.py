"""Manifests: what makes a directory an artifact.

``manifest.json`` lists every file with size and sha256, the artifact's kind, its parents, the recipe stage that made it and
the versions of code and libraries. The artifact's id is the sha256 of that manifest's canonical bytes, so equal content
has an equal id and a changed byte is always noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from parampara.errors import ArtifactDamaged, InvalidData
from parampara.schemas.stages import ArtifactKind

MANIFEST_NAME = "manifest.json"
_SHARDS_AT_ONCE = 4
"""Files hashed in parallel: one core hashes slower than a disk reads."""


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    path: str
    """Relative POSIX path inside the artifact."""
    size: int
    sha256: str


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: int = 1
    kind: ArtifactKind
    files: list[FileEntry]
    parents: list[str] = []
    """Ids of the artifacts that this one was made from, in order of use."""
    config: dict[str, Any] = {}
    """The stage's parameters (no paths of the machine that ran it)."""
    versions: dict[str, str] = {}

    def canonical_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    @property
    def id(self) -> str:
        return "sha256:" + hashlib.sha256(self.canonical_bytes()).hexdigest()

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.files)


def sha256_file(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(directory: Path, *, kind: ArtifactKind, parents: list[str], config: dict[str, Any], versions: dict[str, str]) -> Manifest:
    """Hash every file below ``directory`` into a manifest.

    Raises:
        InvalidData: the directory is empty, or holds a link or a special file.
    """
    files = [
        FileEntry(path=path.relative_to(directory).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))
        for path in regular_files(directory)
        if path.relative_to(directory).as_posix() != MANIFEST_NAME
    ]
    if not files:
        raise InvalidData(f"The artifact directory {directory.name} is empty: the stage wrote nothing.")
    return Manifest(kind=kind, files=files, parents=parents, config=config, versions=versions)


def verify(directory: Path, manifest: Manifest, *, deep: bool = True) -> None:
    """Check that ``directory`` holds exactly what the manifest says (``deep`` also hashes the bytes).

    Raises:
        ArtifactDamaged: names the first file that is missing, added or different, or a link where files should be.
    """
    listed = {entry.path: entry for entry in manifest.files}
    try:
        present = {p.relative_to(directory).as_posix(): p for p in regular_files(directory)}
    except InvalidData as error:
        raise ArtifactDamaged(f"{directory.name}: {error.message}") from None
    present.pop(MANIFEST_NAME, None)
    if extra := sorted(set(present) - set(listed)):
        raise ArtifactDamaged(f"{directory.name}: file {extra[0]} is not in the manifest.", param=extra[0])
    for name, entry in listed.items():
        if name not in present:
            raise ArtifactDamaged(f"{directory.name}: file {name} is missing.", param=name)
        if present[name].stat().st_size != entry.size:
            raise ArtifactDamaged(f"{directory.name}: file {name} has {present[name].stat().st_size} bytes, not {entry.size}.", param=name)
        if deep and sha256_file(present[name]) != entry.sha256:
            raise ArtifactDamaged(f"{directory.name}: file {name} differs from its sha256.", param=name)


def regular_files(directory: Path) -> Iterator[Path]:
    """Every file below ``directory`` in a fixed order; links and special files are refused."""
    for root, folders, names in os.walk(directory, followlinks=False):
        folders.sort()
        for name in sorted(folders + names):
            path = Path(root) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise InvalidData(f"{path.relative_to(directory)} is a link or a special file; an artifact holds plain files only.")
            if path.is_file():
                yield path


def weights_fingerprint(directory: Path) -> str:
    """sha256 over names and sha256 of all ``*.safetensors`` files: which weights these are, whatever the folder is called.

    Raises:
        InvalidData: there are no safetensors files.
    """
    shards = sorted(directory.glob("*.safetensors"))
    if not shards:
        raise InvalidData(f"{directory} holds no *.safetensors file; convert the model to safetensors first.")
    over = threading.Event()
    with ThreadPoolExecutor(max_workers=_SHARDS_AT_ONCE) as pool:
        try:
            digests = list(pool.map(lambda shard: _sha256_until(shard, over), shards))
        except BaseException:  # a stop among them: the threads need not read to the end
            over.set()
            raise
    return fingerprint_of_shards(dict(zip((shard.name for shard in shards), digests, strict=True)))


def _sha256_until(path: Path, over: threading.Event) -> str:
    """:func:`sha256_file`, given up soon after ``over`` is set."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while not over.is_set() and (count := file.readinto(buffer)):
            digest.update(view[:count])
    return digest.hexdigest()


def fingerprint_of_shards(digests: Mapping[str, str]) -> str:
    """:func:`weights_fingerprint` of files whose sha256 is known already, by name: a writer hashes as it writes."""
    digest = hashlib.sha256()
    for name, sha256 in sorted(digests.items()):
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()
