"""Uploaded files: stored whole or not at all, deleted only when no unfinished run reads them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import get_args

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session, sessionmaker

from control_plane.services.paging import page
from control_plane.transactions import after_commit, after_rollback
from control_plane.uploads import PARTIAL_PREFIX, Upload
from parampara.db.models import File, Run, new_id
from parampara.db.session import transaction
from parampara.errors import InvalidData, InvalidRequest, NotFound, WrongState
from parampara.files import get_file, path_of, safe_label
from parampara.plan import DATASETS
from parampara.schemas.api import Deleted, FileObject, FilePurpose, Order, Page, unix
from parampara.settings import Settings
from parampara.storage import fsync_directory

PURPOSES: tuple[FilePurpose, ...] = get_args(FilePurpose)
_ORPHAN_SECONDS = 3600


def create(session: Session, settings: Settings, upload: Upload) -> FileObject:
    """Make a received upload a file.

    Raises:
        InvalidRequest: purpose missing or unknown, or an unknown form field.
        InvalidData: zero bytes.
    """
    purpose = _purpose(upload.fields)
    if upload.bytes == 0:
        raise InvalidData(f"The file {safe_label(upload.filename or '')!r} is empty (0 bytes).", param="file")
    file = File(id=new_id("file-"), filename=safe_label(upload.filename or ""), purpose=purpose, bytes=upload.bytes, sha256=upload.sha256)
    path = path_of(settings, file.id, file.filename)
    after_rollback(session, lambda: path.unlink(missing_ok=True))
    _settle(upload.path, path)
    session.add(file)
    session.flush()
    session.refresh(file)
    return show(file)


def list_files(session: Session, *, purpose: FilePurpose | None, after: str | None, limit: int, order: Order) -> Page[FileObject]:
    query = select(File).where(File.deleted_at.is_(None))
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    return page(session, query, key=File.id, created=File.created_at, after=after, limit=limit, order=order, show=show)


def get(session: Session, file_id: str) -> FileObject:
    return show(get_file(session, file_id))


def content(session: Session, settings: Settings, file_id: str) -> tuple[Path, str]:
    """Where the bytes of a file lie, and its label.

    Raises:
        NotFound: no such file, or its bytes are gone from disk.
    """
    file = get_file(session, file_id)
    path = path_of(settings, file.id, file.filename)
    if not path.is_file():
        raise NotFound(
            f"The bytes of file {file_id!r} are gone from this server's disk; upload it again.",
            param="file_id",
            code="file_content_missing",
        )
    return path, file.filename


def delete(session: Session, settings: Settings, file_id: str) -> Deleted:
    """Delete a file; its bytes go after COMMIT.

    Raises:
        NotFound: no such file.
        WrongState: an unfinished run reads it.
    """
    get_file(session, file_id)
    file = session.scalars(select(File).where(File.id == file_id, File.deleted_at.is_(None)).with_for_update()).one_or_none()
    if file is None:
        raise NotFound(f"No file {file_id!r}: it was just deleted.", param="file_id", code="file_not_found")
    unfinished = select(Run.id).where(
        Run.state.in_(("queued", "running")), or_(*(Run.datasets.contains({role: [file_id]}) for role in DATASETS))
    )
    if (run_id := session.scalar(unfinished.limit(1))) is not None:
        raise WrongState(f"File {file_id!r} is read by {run_id}, which has not finished. Cancel that run, or wait for it.", param="file_id")
    file.deleted_at = session.scalar(select(func.now()))
    path = path_of(settings, file.id, file.filename)
    after_commit(session, lambda: path.unlink(missing_ok=True))
    return Deleted(id=file_id, object="file")


def sweep(sessions: sessionmaker[Session], settings: Settings) -> list[Path]:
    """Remove what a killed server left behind: partial uploads, and bytes without a row, both at least an hour old."""
    old = [path for path in settings.files_dir.glob("*") if path.is_file() and time.time() - path.stat().st_mtime > _ORPHAN_SECONDS]
    with transaction(sessions) as session:
        known = set(session.scalars(select(File.id).where(File.id.in_([path.stem for path in old]), File.deleted_at.is_(None))))
    orphans = [path for path in old if path.name.startswith((PARTIAL_PREFIX, "file-")) and path.stem not in known]
    for path in orphans:
        path.unlink(missing_ok=True)
    return orphans


def show(file: File) -> FileObject:
    return FileObject(id=file.id, bytes=file.bytes, created_at=unix(file.created_at), filename=file.filename, purpose=_known(file.purpose))


def _purpose(fields: dict[str, str]) -> FilePurpose:
    for name in fields:
        if name.startswith("expires_after"):
            raise InvalidRequest("Files here do not expire: leave expires_after out and delete the file when you are done.", param=name)
        if name != "purpose":
            raise InvalidRequest(
                f"{name!r} is not a known form field; send `file` and `purpose`.", param=name[:80], code="unknown_parameter"
            )
    if "purpose" not in fields:
        raise InvalidRequest("The form has no part `purpose`.", param="purpose", code="missing_required_parameter")
    if fields["purpose"] not in PURPOSES:
        raise InvalidRequest(f"purpose {fields['purpose'][:80]!r} is not one of {', '.join(PURPOSES)}.", param="purpose")
    return _known(fields["purpose"])


def _known(purpose: str) -> FilePurpose:
    return next(known for known in PURPOSES if known == purpose)


def _settle(source: Path, target: Path) -> None:
    fd = os.open(source, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(source, target)
    fsync_directory(target.parent)
