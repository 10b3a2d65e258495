"""``/v1/artifacts``: what jobs made."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import FileResponse

from control_plane.dependencies import After, Limit, Ordering, SessionDep, SettingsDep, requires
from control_plane.services import artifacts
from parampara.schemas.api import ArtifactDetail, ArtifactObject, Page
from parampara.schemas.stages import ArtifactKind

router = APIRouter(prefix="/v1/artifacts", tags=["Artifacts"], dependencies=[requires("jobs")])


@router.get("", summary="List artifacts")
def list_artifacts(
    session: SessionDep, kind: ArtifactKind | None = None, after: After = None, limit: Limit = 20, order: Ordering = "desc"
) -> Page[ArtifactObject]:
    return artifacts.list_artifacts(session, kind=kind, after=after, limit=limit, order=order)


@router.get("/{artifact_id}", summary="Get an artifact")
def get_artifact(session: SessionDep, artifact_id: str) -> ArtifactDetail:
    """Its manifest (every file with size and sha256), the parameters and library versions that made it, and its parents."""
    return artifacts.get(session, artifact_id)


@router.get("/{artifact_id}/files/{path:path}", summary="Download one file of an artifact", response_class=FileResponse)
def get_artifact_file(session: SessionDep, settings: SettingsDep, artifact_id: str, path: str) -> FileResponse:
    """`path` as the manifest lists it; the `ETag` is the file's sha256."""
    place, entry = artifacts.file(session, settings, artifact_id, path)
    return FileResponse(
        place, media_type="application/octet-stream", filename=entry.path.rsplit("/", 1)[-1], headers={"ETag": f'"{entry.sha256}"'}
    )
