"""What users bring: books and question-answer rows, read strictly, chunked and split. No ML dependency.

Books become :class:`Document` (:mod:`.books`), documents become chunks (:mod:`.chunks`), rows become :class:`QaRow`
(:mod:`.qa`), and :mod:`.split` holds some of either out. Every fault is an ``InvalidData`` that names file, row and rule.
"""

from parampara.datasets.books import Document, Page, read_book, validate_books
from parampara.datasets.chunks import Chunk, chunk_document, chunk_documents, chunk_text, iter_chunks
from parampara.datasets.qa import Message, QaRow, Role, count_asked_in_both, count_duplicates, read_qa, validate_qa
from parampara.datasets.split import content_hash, hold_out

__all__ = [
    "Chunk",
    "Document",
    "Message",
    "Page",
    "QaRow",
    "Role",
    "chunk_document",
    "chunk_documents",
    "chunk_text",
    "content_hash",
    "count_asked_in_both",
    "count_duplicates",
    "hold_out",
    "iter_chunks",
    "read_book",
    "read_qa",
    "validate_books",
    "validate_qa",
]
