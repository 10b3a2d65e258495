"""Reading books: every format, every refusal, and parsers that can cost only their own process."""

from __future__ import annotations

import io
import json
import resource
import zipfile
from pathlib import Path

import pytest

from parampara.datasets import read_book, validate_books
from parampara.datasets.parse_child import chapter_text
from parampara.errors import InvalidData

CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf"/></rootfiles></container>'
)
PACKAGE = (
    '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">'
    "<metadata><dc:title>Stellar Lines</dc:title></metadata><manifest>"
    '<item id="two" href="two.xhtml"/><item id="one" href="text/one%20a.xhtml"/></manifest>'
    '<spine><itemref idref="one"/><itemref idref="two"/></spine></package>'
)


def make_epub(path: Path, chapters: dict[str, str], *, package: str = PACKAGE) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("OEBPS/book.opf", package)
        for name, body in chapters.items():
            archive.writestr(name, body)
    return path


def make_pdf(path: Path, pages: list[str | None]) -> Path:
    """A PDF written by hand: one text line per page, or (None) a page without any text, as a scan has."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", "", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET" if text else "0 0 100 100 re f"
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {len(objects)} 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        kids.append(f"{len(objects)} 0 R")
    objects[1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(kids)}] >>"
    out, offsets = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode())
    table = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{offset:010d} 00000 n \n" for offset in offsets).encode())
    out.write(f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode())
    path.write_bytes(out.getvalue())
    return path


def test_text_is_normalised_and_stripped_of_what_no_reader_sees(tmp_path: Path) -> None:
    path = tmp_path / "file-1.txt"
    path.write_bytes("\ufeffcafe\u0301 \u202eevil\u202c\x00\x07 a\u200bb\r\nnext\u2028line क्‍ष".encode())
    book = read_book(path, "KP Reader.txt")
    assert book.title == "KP Reader"
    assert [page.text for page in book.pages] == ["café evil ab\nnext\nline क्‍ष"]


def test_jsonl_rows_are_pages_labelled_by_line(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two", "page": 2}) + "\n", encoding="utf-8")
    assert [(page.label, page.text) for page in read_book(path).pages] == [("1", "one"), ("3", "two")]


def test_pdf_pages_keep_their_numbers(tmp_path: Path) -> None:
    book = read_book(make_pdf(tmp_path / "a.pdf", ["The cusp decides", None, "The sub lord promises"]), "Cusps.pdf")
    assert [(page.label, page.text) for page in book.pages] == [("1", "The cusp decides"), ("3", "The sub lord promises")]


def test_epub_follows_the_spine_and_drops_markup(tmp_path: Path) -> None:
    one = "<html><head><title>x</title><style>p{}</style></head><body><h1>Houses</h1><p>Two &amp; eleven</p><p>Gain.</p></body></html>"
    path = make_epub(tmp_path / "a.epub", {"OEBPS/two.xhtml": "<html><body><p>Later</p></body></html>", "OEBPS/text/one a.xhtml": one})
    book = read_book(path)
    assert book.title == "Stellar Lines"
    assert [(page.label, page.text.split()) for page in book.pages] == [
        ("Houses", ["Houses", "Two", "&", "eleven", "Gain."]),
        ("2", ["Later"]),
    ]


def test_a_chapter_title_is_cleaned_like_its_text(tmp_path: Path) -> None:
    one = "<html><body><h1>One\x00Two\u202egpj</h1><p>Gain.</p></body></html>"
    book = read_book(make_epub(tmp_path / "a.epub", {"OEBPS/two.xhtml": one, "OEBPS/text/one a.xhtml": one}))
    assert "\0" not in book.pages[0].label
    assert "\u202e" not in book.pages[0].label
    assert book.pages[0].label.startswith("One")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "0 bytes"),
        ("a.txt", b"  \n\t ", "no text"),
        ("a.md", b"caf\xe9", "not UTF-8 (byte 0xe9 at offset 3)"),
        ("a.docx", b"hello", ".docx is not a book format"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y", "n": %s}\n' % (b"1" * 5000), "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2: a book row is"),
        ("a.jsonl", b"hello\n", "line 1: not JSON"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("a.pdf", b"%PDF-1.4 and then nothing", "can not be read as PDF"),
        ("a.epub", b"not a zip", "can not be read as EPUB"),
    ],
)
def test_faulty_books_are_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidData) as fault:
        read_book(path, "My " + name)
    assert message in fault.value.message
    assert "My " + name in fault.value.message
    with pytest.raises(InvalidData):
        validate_books([path])


def test_a_scanned_pdf_says_what_to_do(tmp_path: Path) -> None:
    path = make_pdf(tmp_path / "scan.pdf", [None, None])
    for check in (lambda: read_book(path), lambda: validate_books([path])):
        with pytest.raises(InvalidData, match="OCR"):
            check()


def test_an_epub_bomb_is_refused_before_unpacking(tmp_path: Path) -> None:
    path = make_epub(tmp_path / "bomb.epub", {"OEBPS/two.xhtml": "<p>" + "a" * 60_000_000})
    with pytest.raises(InvalidData, match="times its size"):
        read_book(path)


def test_entity_expansion_costs_only_the_child(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12))
    package = f'<?xml version="1.0"?><!DOCTYPE p [<!ENTITY a0 "{"x" * 50}">{entities}]><package><title>&a11;</title></package>'
    with pytest.raises(InvalidData, match="EPUB"):
        read_book(make_epub(tmp_path / "laughs.epub", {}, package=package))


def test_memory_of_the_parser_is_bounded(tmp_path: Path) -> None:
    """A chapter of 160 MB at a harmless ratio needs more than the child's 512 MiB; this process stays small."""
    path = tmp_path / "huge.epub"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("META-INF/container.xml", CONTAINER)
        archive.writestr("OEBPS/book.opf", PACKAGE)
        with archive.open("OEBPS/two.xhtml", "w") as chapter:
            for _ in range(160):
                chapter.write(b"<p>word " + b"many letters " * 80_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidData, match=r"huge\.epub: the EPUB parser gave up within 512 MiB"):
        read_book(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


def test_no_book_at_all_is_refused() -> None:
    with pytest.raises(InvalidData, match="at least one"):
        validate_books([])


def test_good_books_of_every_format_validate(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("hello", encoding="utf-8")
    pdf = make_pdf(tmp_path / "a.pdf", [None, "words"])
    epub = make_epub(tmp_path / "a.epub", {"OEBPS/two.xhtml": "<p>words</p>"})
    validate_books([text, pdf, epub], ["a.txt", "b.pdf", "c.epub"])
    assert ["hello" in read_book(text).text, "words" in read_book(pdf).text, "words" in read_book(epub).text] == [True] * 3
    pdf.write_bytes(text.read_bytes())  # the same call does refuse
    with pytest.raises(InvalidData, match=r"b\.pdf"):
        validate_books([text, pdf, epub], ["a.txt", "b.pdf", "c.epub"])


def test_chapter_text_separates_blocks() -> None:
    assert chapter_text("<h2>A <i>b</i></h2><p>x<br/>y</p><script>no</script>") == ("A b", "\n\nA b\n\n\nx\ny\n")
