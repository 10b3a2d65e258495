"""Text to chunks of at most ``max_tokens`` tokens, cut at paragraph borders, else sentence borders, else between words.

The tokenizer comes in as a callable ``count_tokens(text) -> int``, so that this module serves training (the model's own
tokenizer), evaluation and retrieval (the embedder's) alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from parampara.datasets.books import Document, Page
from parampara.errors import InvalidRequest

CountTokens = Callable[[str], int]

_PARAGRAPH = re.compile(r"\n\s*\n")
# after . ! ? and the Devanagari danda, with closing quotes and brackets, when space and no lower-case letter follow
_SENTENCE = re.compile("(?<=[.!?\u0964\u0965][\"'\u201d\u2019)\\]])\\s+|(?<=[.!?\u0964\u0965])\\s+(?![a-z])|\\n")
_STRETCH = 4_000_000
"""Characters of a document that are cut into chunks together; a longer one is divided between pages, else paragraphs."""
_KEEP_PARAGRAPHS_FROM = 0.6
"""A chunk ends at its last paragraph border when at least this share of it lies before that border."""


@dataclass(frozen=True)
class Chunk:
    """``page`` is the label of the page on which the chunk starts."""

    text: str
    document: str
    page: str
    tokens: int


@dataclass(frozen=True)
class _Unit:
    """A sentence (or a part of an over-long one) and what separates it from the unit before it."""

    text: str
    separator: str
    page: str
    tokens: int


def chunk_text(text: str, *, max_tokens: int, count_tokens: CountTokens, overlap_tokens: int = 0) -> list[str]:
    """Cut ``text``; consecutive chunks share at most ``overlap_tokens`` tokens of whole sentences.

    Raises:
        InvalidRequest: ``overlap_tokens`` is not below ``max_tokens``.
    """
    document = Document(title="", pages=[Page(label="", text=text)])
    return [c.text for c in chunk_document(document, max_tokens=max_tokens, count_tokens=count_tokens, overlap_tokens=overlap_tokens)]


def chunk_documents(documents: Iterable[Document], *, max_tokens: int, count_tokens: CountTokens, overlap_tokens: int = 0) -> list[Chunk]:
    """Chunks of several documents in order; no chunk holds text of two."""
    return [
        chunk
        for document in documents
        for chunk in chunk_document(document, max_tokens=max_tokens, count_tokens=count_tokens, overlap_tokens=overlap_tokens)
    ]


def chunk_document(document: Document, *, max_tokens: int, count_tokens: CountTokens, overlap_tokens: int = 0) -> list[Chunk]:
    """Chunks of one document in order; a chunk may run over a page border and is labelled with its first page.

    Raises:
        InvalidRequest: ``max_tokens`` is below 1, or ``overlap_tokens`` is not below ``max_tokens``.
    """
    return list(iter_chunks(document, max_tokens=max_tokens, count_tokens=count_tokens, overlap_tokens=overlap_tokens))


def iter_chunks(document: Document, *, max_tokens: int, count_tokens: CountTokens, overlap_tokens: int = 0) -> Iterator[Chunk]:
    """The chunks of :func:`chunk_document` one by one. A document above ``_STRETCH`` characters is divided into stretches first, so that
    a book of hundreds of megabytes is not taken to pieces at once; no chunk runs over their borders.
    """
    if max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}; a chunk holds at least 1 token.", param="max_tokens")
    if not 0 <= overlap_tokens < max_tokens:
        raise InvalidRequest(
            f"overlap_tokens is {overlap_tokens}; it must be at least 0 and below max_tokens ({max_tokens}).", param="overlap_tokens"
        )
    for stretch in _stretches(document):
        yield from _chunks_of(stretch, max_tokens=max_tokens, count_tokens=count_tokens, overlap_tokens=overlap_tokens)


def _chunks_of(document: Document, *, max_tokens: int, count_tokens: CountTokens, overlap_tokens: int) -> Iterator[Chunk]:
    units = [unit for page in document.pages for unit in _units(page, max_tokens=max_tokens, count_tokens=count_tokens)]
    start = fresh = 0  # fresh: first unit that no earlier chunk holds
    while fresh < len(units):
        end = _end_of_chunk(units, start, fresh, max_tokens=max_tokens, count_tokens=count_tokens)
        while start < fresh and count_tokens(_join(units[start:end])) > max_tokens:
            start += 1  # less overlap rather than a chunk above the limit
        text = _join(units[start:end])
        yield Chunk(text=text, document=document.title, page=units[start].page, tokens=count_tokens(text))
        fresh = end
        start = _start_of_overlap(units, start, end, overlap_tokens=overlap_tokens, max_tokens=max_tokens)


def _stretches(document: Document) -> Iterator[Document]:
    """The document in parts of at most ``_STRETCH`` characters, divided between paragraphs, else lines, else words."""
    pages: list[Page] = []
    size = 0
    for page in document.pages:
        start = 0
        while start < len(page.text):
            if size and size + len(page.text) > _STRETCH:
                yield Document(document.title, pages)
                pages, size = [], 0
            end = min(start + _STRETCH, len(page.text))
            divided = end < len(page.text)
            if divided:
                borders = (page.text.rfind(mark, start + 1, end) for mark in ("\n\n", "\n", " "))
                end = next((border for border in borders if border > start), end)
            pages.append(Page(page.label, page.text[start:end]))
            size += end - start
            start = end
    if pages:
        yield Document(document.title, pages)


def _units(page: Page, *, max_tokens: int, count_tokens: CountTokens) -> list[_Unit]:
    units: list[_Unit] = []
    for paragraph in _PARAGRAPH.split(page.text):
        separator = "\n\n"
        position = 0
        for match in [*_SENTENCE.finditer(paragraph), None]:
            sentence = paragraph[position : match.start() if match else len(paragraph)].strip()
            position = match.end() if match else len(paragraph)
            for piece, tokens in _fitting(sentence, max_tokens=max_tokens, count_tokens=count_tokens) if sentence else []:
                units.append(_Unit(text=piece, separator=separator, page=page.label, tokens=tokens))
                separator = " "
            if sentence and match:
                separator = "\n" if "\n" in match.group() else " "
    return units


def _fitting(sentence: str, *, max_tokens: int, count_tokens: CountTokens) -> list[tuple[str, int]]:
    """The sentence, halved between words (or, within one long word, between characters) until each part fits."""
    tokens = count_tokens(sentence)
    if tokens <= max_tokens or len(sentence) < 2:
        return [(sentence, tokens)]
    middle = len(sentence) // 2
    space = min((m.start() for m in re.finditer(r"\s", sentence)), key=lambda at: abs(at - middle), default=middle)
    parts = (sentence[:space].strip(), sentence[space:].strip())
    if not all(parts):
        parts = (sentence[:middle], sentence[middle:])
    return [piece for part in parts for piece in _fitting(part, max_tokens=max_tokens, count_tokens=count_tokens)]


def _end_of_chunk(units: list[_Unit], start: int, fresh: int, *, max_tokens: int, count_tokens: CountTokens) -> int:
    """Index after the last unit of the chunk that starts at ``start``; always above ``fresh``."""
    end, total = start, 0
    while end < len(units) and (total + units[end].tokens <= max_tokens or end <= fresh):
        total += units[end].tokens
        end += 1
    # joining may cost tokens that no unit counts alone (separators, other merges of the tokenizer)
    while end > fresh + 1 and count_tokens(_join(units[start:end])) > max_tokens:
        end -= 1
    if end == len(units):
        return end
    border = next((at for at in range(end, fresh, -1) if units[at].separator == "\n\n"), None)
    if border is not None and sum(unit.tokens for unit in units[start:border]) >= _KEEP_PARAGRAPHS_FROM * total:
        return border
    return end


def _start_of_overlap(units: list[_Unit], start: int, end: int, *, overlap_tokens: int, max_tokens: int) -> int:
    """First unit of the next chunk: as many trailing units of the last one as fit beside a new one, never all of them."""
    if end == len(units):
        return end
    room = min(overlap_tokens, max_tokens - units[end].tokens)
    begin = end
    while begin - 1 > start and units[begin - 1].tokens <= room:
        begin -= 1
        room -= units[begin].tokens
    return begin


def _join(units: list[_Unit]) -> str:
    return units[0].text + "".join(unit.separator + unit.text for unit in units[1:])
