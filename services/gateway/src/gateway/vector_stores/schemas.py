"""Wire forms of ``/v1/vector_stores``, as openai-python types them. What it does not type stands under ``parampara``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from parampara.schemas.api import Answer, FileId, Metadata, Request

AUTO_CHUNK_TOKENS = 200
AUTO_OVERLAP_TOKENS = 40
MAX_BATCH_FILES = 2000
FileStatus = Literal["in_progress", "completed", "cancelled", "failed"]
Attributes = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)] | bool | float],
    Field(max_length=16, description="At most 16 pairs; text values up to 512 characters. Integers come back as floats."),
]


class StaticChunking(Request):
    max_chunk_size_tokens: Annotated[int, Field(ge=100, le=4096)]
    chunk_overlap_tokens: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _overlap_is_at_most_half(self) -> StaticChunking:
        if self.chunk_overlap_tokens > self.max_chunk_size_tokens // 2:
            raise ValueError(f"chunk_overlap_tokens may be at most half of max_chunk_size_tokens ({self.max_chunk_size_tokens // 2})")
        return self


class AutoStrategy(Request):
    """200 tokens with 40 of overlap: what the default embedding model sees at once, and small models have room for."""

    type: Literal["auto"]

    def sizes(self) -> StaticChunking:
        return StaticChunking(max_chunk_size_tokens=AUTO_CHUNK_TOKENS, chunk_overlap_tokens=AUTO_OVERLAP_TOKENS)


class StaticStrategy(Request):
    type: Literal["static"]
    static: StaticChunking

    def sizes(self) -> StaticChunking:
        return self.static


Strategy = Annotated[AutoStrategy | StaticStrategy, Field(discriminator="type")]


def auto() -> AutoStrategy:
    return AutoStrategy(type="auto")


class _Expiring(Request):
    expires_after: Any = None

    @model_validator(mode="after")
    def _never_expires(self) -> _Expiring:
        if self.expires_after is not None:
            raise ValueError("expires_after is not supported: a vector store lives until it is deleted")
        return self


class CreateStore(_Expiring):
    name: Annotated[str, Field(max_length=256)] | None = None
    description: Any = None
    file_ids: Annotated[list[FileId], Field(max_length=MAX_BATCH_FILES)] = []
    chunking_strategy: Strategy = Field(default_factory=auto)
    metadata: Metadata | None = None

    @field_validator("description")
    @classmethod
    def _has_no_place(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("description is not supported: put it into metadata")


class UpdateStore(_Expiring):
    name: Annotated[str, Field(max_length=256)] | None = None
    metadata: Metadata | None = None


class AttachFile(Request):
    file_id: FileId
    attributes: Attributes | None = None
    chunking_strategy: Strategy = Field(default_factory=auto)


class UpdateFile(Request):
    attributes: Attributes | None


class CreateBatch(Request):
    """``file_ids`` with one setting for all, or ``files`` with settings of their own."""

    file_ids: Annotated[list[FileId], Field(max_length=MAX_BATCH_FILES)] | None = None
    files: Annotated[list[AttachFile], Field(max_length=MAX_BATCH_FILES)] | None = None
    attributes: Attributes | None = None
    chunking_strategy: Strategy = Field(default_factory=auto)

    @model_validator(mode="after")
    def _one_of_both(self) -> CreateBatch:
        if bool(self.file_ids) == bool(self.files):
            raise ValueError("give either file_ids or files, with at least one file")
        return self

    def attachments(self) -> list[AttachFile]:
        if self.files:
            return self.files
        return [
            AttachFile(file_id=file_id, attributes=self.attributes, chunking_strategy=self.chunking_strategy)
            for file_id in self.file_ids or []
        ]


class SearchStore(Request):
    query: (
        Annotated[str, Field(min_length=1, max_length=8000)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=8000)]], Field(min_length=1, max_length=16)]
    )
    filters: dict[str, Any] | None = None
    max_num_results: Annotated[int, Field(ge=1, le=50)] = 10
    ranking_options: dict[str, Any] | None = None
    rewrite_query: bool = False

    @model_validator(mode="after")
    def _no_rewriting(self) -> SearchStore:
        if self.rewrite_query:
            raise ValueError("rewrite_query is not supported: the query is searched as it is")
        return self


class FileCounts(Answer):
    in_progress: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    total: int = 0


class StoreObject(Answer):
    id: str
    object: Literal["vector_store"] = "vector_store"
    created_at: int
    name: str
    usage_bytes: int
    file_counts: FileCounts
    status: Literal["expired", "in_progress", "completed"]
    last_active_at: int
    metadata: dict[str, str]
    expires_after: None = None
    expires_at: None = None
    parampara: dict[str, Any]


class LastError(Answer):
    code: Literal["server_error", "unsupported_file", "invalid_file"]
    message: str


class StaticStrategyObject(Answer):
    type: Literal["static"] = "static"
    static: dict[str, int]


class StoreFileObject(Answer):
    id: str
    object: Literal["vector_store.file"] = "vector_store.file"
    created_at: int
    vector_store_id: str
    status: FileStatus
    usage_bytes: int
    last_error: LastError | None
    attributes: dict[str, str | bool | float]
    chunking_strategy: StaticStrategyObject
    parampara: dict[str, Any]


class BatchObject(Answer):
    id: str
    object: Literal["vector_store.files_batch"] = "vector_store.files_batch"
    created_at: int
    vector_store_id: str
    status: FileStatus
    file_counts: FileCounts


class TextContent(Answer):
    type: Literal["text"] = "text"
    text: str


class SearchResult(Answer):
    file_id: str
    filename: str
    score: float
    attributes: dict[str, str | bool | float]
    content: list[TextContent]
    parampara: dict[str, Any]


class ResultsPage(Answer):
    object: Literal["vector_store.search_results.page"] = "vector_store.search_results.page"
    search_query: list[str]
    data: list[SearchResult]
    has_more: bool = False
    next_page: None = None


class ContentPage(Answer):
    object: Literal["vector_store.file_content.page"] = "vector_store.file_content.page"
    data: list[TextContent]
    has_more: bool = False
    next_page: None = None
