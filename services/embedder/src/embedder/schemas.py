"""The wire form of ``/v1/embeddings``, as openai-python defines it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from parampara.errors import InvalidRequest

MAX_INPUTS = 2048
MAX_INPUT_CHARACTERS = 500_000
MAX_TOKENS = 65_536


class EmbeddingsRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: str
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None

    def texts(self) -> list[str]:
        """The inputs as a list.

        Raises:
            InvalidRequest: empty, too many, too long, or token ids (they belong to another model's vocabulary).
        """
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not isinstance(texts, list) or not texts:
            raise InvalidRequest("input must be a string or a non-empty list of strings.", param="input")
        if len(texts) > MAX_INPUTS:
            raise InvalidRequest(f"input holds {len(texts)} items; the limit is {MAX_INPUTS}.", param="input")
        for number, text in enumerate(texts):
            where = "input" if isinstance(self.input, str) else f"input[{number}]"
            if not isinstance(text, str):
                raise InvalidRequest(
                    f"{where} must be a string, not {type(text).__name__}. Token ids are refused: they belong to another model's "
                    "vocabulary (LangChain: set check_embedding_ctx_length=False).",
                    param=where,
                )
            if not text:
                raise InvalidRequest(f"{where} is an empty string.", param=where)
            if len(text) > MAX_INPUT_CHARACTERS:
                raise InvalidRequest(f"{where} has {len(text)} characters; the limit is {MAX_INPUT_CHARACTERS}.", param=where)
        return texts


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or the little-endian float32 bytes in base64."""


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class EmbeddingModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "parampara"


class EmbeddingModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingModel]
