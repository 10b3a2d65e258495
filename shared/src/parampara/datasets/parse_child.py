"""The throw-away child of :mod:`parampara.datasets.sandbox`: document on standard input, JSON on standard output.

Run as ``python -m parampara.datasets.parse_child <pdf|epub> <all|first>``. Limits are set before the first byte is read, and
root steps down to nobody where nobody can read the interpreter's libraries.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import resource
import sys
import xml.etree.ElementTree as ElementTree
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from parampara.datasets.sandbox import CPU_SECONDS, MEMORY_BYTES

MAX_PAGES = 20_000
MAX_CHARACTERS = 100_000_000
MAX_MEMBERS = 5_000
MAX_UNPACKED_BYTES = 256 * 1024 * 1024
MAX_RATIO = 200
_NOBODY = 65534
Pages = list[tuple[str, str]]


class Refused(Exception):
    """The document can not be used; the message is for its owner."""


def main() -> int:
    kind, extent = sys.argv[1], sys.argv[2]
    import pypdf  # before the limits: loading the library is no part of the document's budget
    import pypdf.errors

    confine()
    try:
        data = io.BytesIO(sys.stdin.buffer.read())
        title, pages = read_epub(data, first=extent == "first") if kind == "epub" else read_pdf(pypdf, data, first=extent == "first")
        answer: dict[str, Any] = {"title": title, "pages": pages}
    except Refused as error:
        answer = {"error": str(error)}
    except MemoryError:
        return 3
    except Exception as error:  # noqa: BLE001 - the boundary of this process: a parser may raise anything on a damaged file
        answer = {"error": f"can not be read as {kind.upper()} ({type(error).__name__}: {str(error)[:200]})."}
    sys.stdout.buffer.write(json.dumps(answer).encode("utf-8"))
    sys.stdout.buffer.flush()
    return 0


def confine() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid() == 0 and all(_readable_by_all(Path(module)) for module in (__file__, os.__file__)):
        os.setgroups([])
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _readable_by_all(path: Path) -> bool:
    """Whether nobody could still import what lies beside ``path``: parsers load codecs and filters late."""
    folders_open = all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)
    return folders_open and bool(path.stat().st_mode & 0o004)


def read_pdf(pypdf: Any, data: io.BytesIO, *, first: bool) -> tuple[str, Pages]:
    reader = pypdf.PdfReader(data, strict=False)
    if reader.is_encrypted and not reader.decrypt(""):
        raise Refused("the PDF is encrypted; remove the password first.")
    if len(reader.pages) > MAX_PAGES:
        raise Refused(f"the PDF has {len(reader.pages)} pages, above the limit of {MAX_PAGES}; split it.")
    title = reader.metadata.title if reader.metadata and isinstance(reader.metadata.title, str) else ""
    labels = _page_labels(reader)
    pages: Pages = []
    characters = 0
    for number, page in enumerate(reader.pages):
        text = page.extract_text() or ""
        characters += len(text)
        if characters > MAX_CHARACTERS:
            raise Refused(f"more than {MAX_CHARACTERS} characters of text; split it.")
        pages.append((labels[number], text))
        if first and text.strip():
            break
    return title, pages


def _page_labels(reader: Any) -> list[str]:
    """The printed page numbers where the PDF names them, else 1, 2, 3..."""
    try:
        labels = [str(label) for label in reader.page_labels]
    except Exception:  # noqa: BLE001 - optional metadata of a foreign file: any fault in it only costs the printed numbers
        labels = []
    return labels if len(labels) == len(reader.pages) else [str(number) for number in range(1, len(reader.pages) + 1)]


def read_epub(data: io.BytesIO, *, first: bool) -> tuple[str, Pages]:
    """Chapters in the order of the spine (EPUB 3.3, section 5.7), text of each without markup."""
    with zipfile.ZipFile(data) as archive:
        _check_members(archive)
        container = ElementTree.fromstring(archive.read("META-INF/container.xml"))
        root_file = next((e.get("full-path") for e in container.iter() if _local(e) == "rootfile" and e.get("full-path")), None)
        if root_file is None:
            raise Refused("the EPUB names no package document.")
        package = ElementTree.fromstring(archive.read(root_file))
        title = next((e.text or "" for e in package.iter() if _local(e) == "title"), "")
        hrefs = {e.get("id"): e.get("href", "") for e in package.iter() if _local(e) == "item"}
        spine = [hrefs[ref] for e in package.iter() if _local(e) == "itemref" and (ref := e.get("idref")) in hrefs]
        pages: Pages = []
        names = set(archive.namelist())
        for number, href in enumerate(spine, 1):
            member = posixpath.normpath(posixpath.join(posixpath.dirname(root_file), unquote(href.split("#")[0])))
            if member not in names:
                continue
            heading, text = chapter_text(archive.read(member).decode("utf-8", errors="replace"))
            pages.append((heading or str(number), text))
            if first and text.strip():
                break
        return title, pages


def _check_members(archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise Refused(f"the EPUB holds {len(members)} files, above the limit of {MAX_MEMBERS}.")
    unpacked = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members) or 1
    if unpacked > MAX_UNPACKED_BYTES or unpacked / packed > MAX_RATIO:
        raise Refused(f"the EPUB unpacks to {unpacked} bytes ({unpacked // packed} times its size); that is not a book.")
    if any(member.flag_bits & 1 for member in members):
        raise Refused("the EPUB is encrypted (DRM); only books without it can be read.")


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def chapter_text(markup: str) -> tuple[str, str]:
    """First heading and text of one XHTML chapter; block elements become paragraphs."""
    parser = _ChapterParser()
    parser.feed(markup)
    parser.close()
    lines = [" ".join(line.split()) for line in "".join(parser.parts).split("\n")]
    return " ".join("".join(parser.heading).split())[:120], "\n".join(lines)


class _ChapterParser(HTMLParser):
    BLOCKS = {"p", "div", "section", "article", "li", "tr", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "br", "table", "ul", "ol"}
    HIDDEN = {"script", "style", "head", "title"}
    HEADINGS = {"h1", "h2", "h3"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.heading: list[str] = []
        self._hidden = 0
        self._in_heading = False
        self._had_heading = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.HIDDEN:
            self._hidden += 1
        elif tag in self.BLOCKS:
            self.parts.append("\n" if tag in ("br", "li", "tr") else "\n\n")
        if tag in self.HEADINGS and not self._had_heading:
            self._in_heading = self._had_heading = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.HIDDEN:
            self._hidden = max(0, self._hidden - 1)
        elif tag in self.BLOCKS:
            self.parts.append("\n")
        if tag in self.HEADINGS:
            self._in_heading = False

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        self.parts.append(data.replace("\n", " "))
        if self._in_heading:
            self.heading.append(data)


if __name__ == "__main__":
    sys.exit(main())
