"""Books: plain text, Markdown, PDF, EPUB, or JSON lines of ``{"text": ...}``, read into pages of clean text.

PDF and EPUB are complex formats written by strangers, so they are parsed in a throw-away child process with hard limits
(:mod:`parampara.datasets.sandbox`); a bomb costs the child, never the caller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from parampara.datasets.sandbox import parse_apart
from parampara.datasets.text import checked_size, clean_text, decode_utf8
from parampara.errors import InvalidData

BOOK_EXTENSIONS = (".txt", ".md", ".pdf", ".epub", ".jsonl")
MAX_BOOK_BYTES = 512 * 1024 * 1024
MAX_LINE_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Page:
    """``label`` is what a citation shows: a page number, a chapter, or empty where the format has none."""

    label: str
    text: str


@dataclass(frozen=True)
class Document:
    title: str
    pages: list[Page]

    @property
    def text(self) -> str:
        return "\n\n".join(page.text for page in self.pages)


def read_book(path: Path, label: str | None = None) -> Document:
    """Read one book; ``label`` is its name in messages and the default title (files in the store have made-up names).

    Raises:
        InvalidData: unknown extension, empty, not UTF-8, no text (a scanned PDF), encrypted, or too costly to parse.
    """
    name = label or path.name
    suffix = _suffix(path, name)
    checked_size(path, name=name, limit=MAX_BOOK_BYTES)
    if suffix in (".pdf", ".epub"):
        title, pages = parse_apart(path, kind=suffix[1:], name=name)
    elif suffix == ".jsonl":
        title, pages = "", [(str(number), text) for number, text in _jsonl_texts(path, name)]
    else:
        title, pages = "", [("", decode_utf8(path.read_bytes(), name=name))]
    cleaned = [Page(label=clean_text(mark).strip(), text=text) for mark, raw in pages if (text := clean_text(raw).strip())]
    if not cleaned:
        raise InvalidData(f"{name}: {_no_text(suffix)}", param=name)
    return Document(title=clean_text(title).strip() or Path(name).stem, pages=cleaned)


def validate_books(paths: Iterable[Path], labels: Iterable[str] | None = None) -> None:
    """Check that every file would be read, without building the documents. PDF and EPUB are parsed up to their first text.

    Raises:
        InvalidData: as :func:`read_book`, for the first file at fault; or there is no file at all.
    """
    files = list(paths)
    if not files:
        raise InvalidData("No book was given; at least one is needed.", param="books")
    for path, name in zip(files, list(labels) if labels is not None else [path.name for path in files], strict=True):
        suffix = _suffix(path, name)
        if suffix not in (".pdf", ".epub"):
            read_book(path, name)
            continue
        checked_size(path, name=name, limit=MAX_BOOK_BYTES)
        _, pages = parse_apart(path, kind=suffix[1:], name=name, until_text=True)
        if not any(clean_text(text).strip() for _, text in pages):
            raise InvalidData(f"{name}: {_no_text(suffix)}", param=name)


def _suffix(path: Path, name: str) -> str:
    suffix = path.suffix.lower() if path.suffix.lower() in BOOK_EXTENSIONS else Path(name).suffix.lower()
    if suffix not in BOOK_EXTENSIONS:
        raise InvalidData(f"{name}: {suffix or 'no extension'} is not a book format; use one of {', '.join(BOOK_EXTENSIONS)}.", param=name)
    return suffix


def _no_text(suffix: str) -> str:
    if suffix == ".pdf":
        return "the PDF holds no text, only pictures (a scan); run OCR on it first, e.g. with ocrmypdf."
    return "the file holds no text."


def _jsonl_texts(path: Path, name: str) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                raise InvalidData(f"{name} line {number}: longer than {MAX_LINE_BYTES} bytes.", param=name)
            if not line.strip():
                continue
            text = decode_utf8(line, name=f"{name} line {number}")
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # a plain ValueError: an integer of more digits than Python converts
                raise InvalidData(f"{name} line {number}: not JSON ({error}).", param=name) from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise InvalidData(f'{name} line {number}: a book row is {{"text": "..."}}, got {_columns(row)}.', param=name)
            yield number, row["text"]


def _columns(row: object) -> str:
    return f"columns {sorted(row)[:8]}" if isinstance(row, dict) else type(row).__name__
