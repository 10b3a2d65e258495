"""What users bring: books, question-answer rows and preferences, read strictly, chunked and split. No ML dependency.

Books become :class:`Document` (:mod:`.books`), documents become chunks (:mod:`.chunks`), rows become :class:`QaRow`
(:mod:`.qa`) or :class:`PreferenceRow` (:mod:`.preferences`), and :mod:`.split` holds some of any of them out. Every fault is an
``InvalidData`` that names file, row and rule.
"""

from parampara.datasets.books import Document, Page, read_book, validate_books
from parampara.datasets.chunks import Chunk, chunk_document, chunk_documents, chunk_text, iter_chunks
from parampara.datasets.preferences import PreferenceRow, read_preferences, validate_preferences
from parampara.datasets.qa import QaRow, read_qa, validate_qa
from parampara.datasets.rows import Message, Role, count_asked_in_both, count_duplicates
from parampara.datasets.split import content_hash, hold_out

__all__ = [
    "Chunk",
    "Document",
    "Message",
    "Page",
    "PreferenceRow",
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
    "read_preferences",
    "read_qa",
    "validate_books",
    "validate_preferences",
    "validate_qa",
]
