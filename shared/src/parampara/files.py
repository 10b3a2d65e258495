"""Uploaded files: where their bytes lie and how other parts find them.

Bytes lie at ``<files_dir>/<file id><suffix>``. The id is made by the server; the client's name is a label in the database
and never part of a path. The suffix is kept, from an allow-list, because readers of books choose their format by it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from sqlalchemy import select
from sqlalchemy.orm import Session

from parampara.db.models import File
from parampara.errors import NotFound
from parampara.settings import Settings

SUFFIXES = (".jsonl", ".json", ".txt", ".md", ".pdf", ".epub")
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")
_NOT_IN_LABELS = re.compile(r"[^\w .()\[\]+,@-]")
_LABEL_LENGTH = 80


def path_of(settings: Settings, file_id: str, filename: str) -> Path:
    """Where the bytes of a file lie.

    Raises:
        NotFound: ``file_id`` is not the id of a file (and so never becomes part of a path).
    """
    if not _FILE_ID.fullmatch(file_id):
        raise _unknown(file_id, param="file_id")
    return settings.files_dir / (file_id + suffix_of(filename))


def suffix_of(filename: str) -> str:
    """The suffix that bytes are stored with: one of ``SUFFIXES``, or nothing."""
    suffix = PurePosixPath(filename).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def safe_label(filename: str) -> str:
    """A client's file name as a label: the last path part, NFC, no control or bidirectional characters, at most 80 characters."""
    name = unicodedata.normalize("NFC", filename).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    name = _NOT_IN_LABELS.sub("_", name).strip(" .")
    cut = len(name) - len(suffix_of(name))
    stem, suffix = name[:cut].strip(" ."), name[cut:]
    return (stem[: _LABEL_LENGTH - len(suffix)] or "file") + suffix


def get_file(session: Session, file_id: str, *, param: str = "file_id", lock: bool = False) -> File:
    """Row of a file that is not deleted; ``lock`` keeps it from being deleted until the transaction ends.

    Raises:
        NotFound: names ``param`` and the id.
    """
    return get_files(session, [file_id], param=param, lock=lock)[0]


def get_files(session: Session, file_ids: Iterable[str], *, param: str, lock: bool = False) -> list[File]:
    """Rows of files, in the order of ``file_ids``.

    Raises:
        NotFound: names ``param`` and the first id that is missing.
    """
    wanted = list(file_ids)
    possible = {file_id for file_id in wanted if _FILE_ID.fullmatch(file_id)}
    query = select(File).where(File.id.in_(possible), File.deleted_at.is_(None)).order_by(File.id)
    found = {row.id: row for row in session.scalars(query.with_for_update(read=True) if lock else query)}
    for file_id in wanted:
        if file_id not in found:
            raise _unknown(file_id, param=param)
    return [found[file_id] for file_id in wanted]


def _unknown(file_id: str, *, param: str) -> NotFound:
    return NotFound(
        f"No file {file_id!r}: it was never uploaded or was deleted. Upload it with POST /v1/files.", param=param, code="file_not_found"
    )
