"""Artifacts: what jobs made, with manifest and ancestry; files are handed out only as the manifest lists them."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from control_plane.services.paging import page
from parampara.db.models import Artifact
from parampara.errors import NotFound
from parampara.manifest import FileEntry, Manifest
from parampara.schemas.api import ArtifactDetail, ArtifactFile, ArtifactObject, Order, Page, unix
from parampara.schemas.stages import ArtifactKind
from parampara.settings import Settings
from parampara.storage import LocalStorage


def list_artifacts(session: Session, *, kind: ArtifactKind | None, after: str | None, limit: int, order: Order) -> Page[ArtifactObject]:
    query = select(Artifact) if kind is None else select(Artifact).where(Artifact.kind == kind)
    return page(session, query, key=Artifact.id, created=Artifact.created_at, after=after, limit=limit, order=order, show=show)


def get(session: Session, artifact_id: str) -> ArtifactDetail:
    row = get_row(session, artifact_id)
    manifest = Manifest.model_validate(row.manifest)
    parents = {parent.id: parent for parent in session.scalars(select(Artifact).where(Artifact.id.in_(row.parents)))}
    return ArtifactDetail(
        **show(row).model_dump(),
        files=[ArtifactFile(path=entry.path, size=entry.size, sha256=entry.sha256) for entry in manifest.files],
        config=manifest.config,
        versions=manifest.versions,
        parent_artifacts=[show(parents[parent]) for parent in row.parents if parent in parents],
    )


def file(session: Session, settings: Settings, artifact_id: str, name: str) -> tuple[Path, FileEntry]:
    """Where one file of an artifact lies. ``name`` is looked up in the manifest, never joined to a path unseen.

    Raises:
        NotFound: no such artifact, no such file in it, or its bytes are not on this server.
    """
    manifest = Manifest.model_validate(get_row(session, artifact_id).manifest)
    entry = next((entry for entry in manifest.files if entry.path == name), None)
    if entry is None:
        listed = ", ".join(entry.path for entry in manifest.files[:20])
        raise NotFound(f"Artifact {artifact_id} holds no file {name!r}; it holds {listed}.", param="path")
    path = LocalStorage(settings.artifacts_dir).path(artifact_id) / entry.path
    if path.is_symlink() or not path.is_file():
        raise NotFound(f"The bytes of {name!r} are not on this server.", param="path", code="artifact_content_missing")
    return path, entry


def get_row(session: Session, artifact_id: str, *, param: str = "artifact_id") -> Artifact:
    row = session.get(Artifact, artifact_id)
    if row is None:
        raise NotFound(f"No artifact {artifact_id!r}.", param=param)
    return row


def show(row: Artifact) -> ArtifactObject:
    return ArtifactObject.model_validate(
        {
            "id": row.id,
            "kind": row.kind,
            "bytes": row.bytes,
            "parents": row.parents,
            "job_id": row.job_id,
            "created_at": unix(row.created_at),
        }
    )
