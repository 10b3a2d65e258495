"""``/v1/files``, in OpenAI's shapes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from control_plane.dependencies import After, Ordering, SessionDep, SettingsDep, requires
from control_plane.services import files
from control_plane.uploads import UploadDep
from parampara.schemas.api import Deleted, FileObject, FilePurpose, Page

router = APIRouter(prefix="/v1/files", tags=["Files"], dependencies=[requires("jobs")])

_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(files.PURPOSES), "example": "fine-tune"},
                    },
                }
            }
        },
    }
}


@router.post("", openapi_extra=_FORM, summary="Upload a file")
def create_file(session: SessionDep, settings: SettingsDep, upload: UploadDep) -> FileObject:
    """Streamed to disk; answered once the bytes and the row are safe. A cut upload leaves nothing behind.

    Books: `.txt .md .pdf .epub`, or `.jsonl` rows `{"text": ...}`. Q&A: `.jsonl` rows `{"messages": [...]}`, `{"question", "answer"}` or
    `{"instruction", "input"?, "output"}`.
    """
    return files.create(session, settings, upload)


@router.get("", summary="List files")
def list_files(
    session: SessionDep,
    purpose: FilePurpose | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Ordering = "desc",
) -> Page[FileObject]:
    return files.list_files(session, purpose=purpose, after=after, limit=limit, order=order)


@router.get("/{file_id}", summary="Get a file")
def get_file(session: SessionDep, file_id: str) -> FileObject:
    return files.get(session, file_id)


@router.get("/{file_id}/content", summary="Download a file", response_class=FileResponse)
def get_content(session: SessionDep, settings: SettingsDep, file_id: str) -> FileResponse:
    path, label = files.content(session, settings, file_id)
    return FileResponse(path, media_type="application/octet-stream", filename=label)


@router.delete("/{file_id}", summary="Delete a file")
def delete_file(session: SessionDep, settings: SettingsDep, file_id: str) -> Deleted:
    """Refused while an unfinished run reads the file."""
    return files.delete(session, settings, file_id)
