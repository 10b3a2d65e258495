"""Receives ``multipart/form-data`` uploads straight onto disk, with a running sha256 and a size limit.

The bytes go to ``<files_dir>/.upload-<random>``; whatever ends the request before the file is stored (a cut connection, a
full disk, a refused purpose) removes that file again.
"""

from __future__ import annotations

import errno
import hashlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

from fastapi import Depends, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from parampara.errors import InvalidRequest, PayloadTooLarge, Unavailable
from parampara.settings import Settings

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PARTIAL_PREFIX = ".upload-"
FORM_OVERHEAD_BYTES = 65_536
"""What boundaries, part headers and fields may add to the file's own bytes."""
_FIELD_BYTES = 1024
_FIELDS = 16


@dataclass
class Upload:
    """A received form. ``path`` holds the file's bytes until someone renames it."""

    path: Path
    filename: str | None = None
    bytes: int = 0
    sha256: str = ""
    fields: dict[str, str] = field(default_factory=dict)


async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """The request's form with its one file part, named ``file``.

    Raises:
        InvalidRequest: not a form, malformed, cut short, no file part or more than one.
        PayloadTooLarge: the file is over ``max_upload_bytes``.
        Unavailable: the disk is full.
    """
    settings: Settings = request.app.state.settings
    boundary = _boundary(request)
    settings.files_dir.mkdir(parents=True, exist_ok=True)
    upload = Upload(path=settings.files_dir / f"{PARTIAL_PREFIX}{uuid.uuid4().hex}")
    try:
        with upload.path.open("xb") as file:
            await _read(request, boundary, _Form(upload, file, settings.max_upload_bytes))
        yield upload
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Unavailable(
            "The disk for uploads is full; nothing of this file was kept. Free space, then try again.", code="storage_full"
        ) from error
    finally:
        upload.path.unlink(missing_ok=True)


UploadDep = Annotated[Upload, Depends(receive_upload, scope="function")]


async def _read(request: Request, boundary: bytes, form: _Form) -> None:
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for block in request.stream():
            parser.write(block)
    except FormParserError as error:
        raise InvalidRequest(f"The form is malformed: {error}", code="invalid_body") from None
    form.finish()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise InvalidRequest("Send the file as multipart/form-data with the parts `file` and `purpose`.", code="invalid_body")
    return options[b"boundary"]


class _Form:
    """Callbacks of the streaming parser."""

    def __init__(self, upload: Upload, file: BinaryIO, limit: int) -> None:
        self._upload, self._file, self._limit = upload, file, limit
        self._digest = hashlib.sha256()
        self._header = b""
        self._value = b""
        self._disposition = b""
        self._name = ""
        self._in_file = False
        self._text = b""
        self._ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def finish(self) -> None:
        if not self._ended:
            raise InvalidRequest("The form ends before its closing boundary: the upload was cut short.", code="invalid_body")
        if self._upload.filename is None:
            raise InvalidRequest("The form has no part `file`.", param="file", code="missing_required_parameter")
        self._upload.sha256 = self._digest.hexdigest()

    def _part_begin(self) -> None:
        self._disposition = self._header = self._value = self._text = b""
        self._in_file = False

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if not self._name:
            raise InvalidRequest("A part of the form has no name.", code="invalid_body")
        if b"filename" not in options:
            return
        if self._name != "file":
            raise InvalidRequest(
                f"The form holds a file part {self._name!r}; only `file` is known.", param=self._name[:80], code="unknown_parameter"
            )
        if self._upload.filename is not None:
            raise InvalidRequest("The form holds two parts `file`; upload one file per request.", param="file")
        self._in_file = True
        self._upload.filename = options[b"filename"].decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        block = data[start:end]
        if not self._in_file:
            self._text += block
            if len(self._text) > _FIELD_BYTES:
                raise InvalidRequest(f"The form field {self._name!r} is over {_FIELD_BYTES} bytes.", param=self._name[:80])
            return
        self._upload.bytes += len(block)
        if self._upload.bytes > self._limit:
            raise PayloadTooLarge(f"The file is over the limit of {self._limit} bytes (PARAMPARA_MAX_UPLOAD_BYTES).", param="file")
        self._digest.update(block)
        self._file.write(block)

    def _part_end(self) -> None:
        if self._in_file:
            return
        self._upload.fields[self._name] = self._text.decode("utf-8", "replace")
        if len(self._upload.fields) > _FIELDS:
            raise InvalidRequest(f"The form has more than {_FIELDS} fields.", code="invalid_body")

    def _end(self) -> None:
        self._ended = True
