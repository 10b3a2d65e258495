"""The embedder's HTTP face: ``/v1/embeddings``, ``/v1/models`` and the routes every service has."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Histogram, generate_latest

from embedder.batcher import Batcher
from embedder.model import BUNDLED_DIMENSIONS, BUNDLED_MODEL, SentenceEncoder, bundled_model_dir
from embedder.schemas import (
    MAX_TOKENS,
    Embedding,
    EmbeddingModel,
    EmbeddingModels,
    EmbeddingsRequest,
    EmbeddingsResponse,
    Usage,
)
from parampara.errors import InvalidRequest, NotFound, Unavailable
from parampara.http import install_docs, install_error_handlers
from parampara.settings import Settings

MAX_BODY_BYTES = 16 * 1024 * 1024
REQUESTS = Counter("parampara_embedder_requests_total", "Answered embedding requests.")
TOKENS = Counter("parampara_embedder_tokens_total", "Tokens embedded.")
SECONDS = Histogram("parampara_embedder_request_seconds", "From request to vectors, waiting included.")


def create_app(settings: Settings) -> FastAPI:
    """The embedder; its model loads when the application starts.

    Raises:
        InvalidRequest: the settings name a model, or a number of dimensions, that this embedder does not hold.
    """
    _require_bundled(settings.embedder.model, settings.embedder.dimensions)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        encoder = SentenceEncoder(bundled_model_dir())
        app.state.encoder, app.state.batcher = encoder, Batcher(encoder)
        app.state.batcher.start()
        await app.state.batcher.encode(await app.state.batcher.tokenize(["warm-up"]))
        yield
        await app.state.batcher.close()

    app = FastAPI(title="Parampara embedder", version="0.1.0", lifespan=lifespan, redoc_url=None, docs_url=None)
    app.state.model_name = settings.embedder.model
    install_docs(app)
    install_error_handlers(app, service="embedder", larger_bodies={"/v1/embeddings": MAX_BODY_BYTES})
    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=Response)
    app.add_api_route("/v1/embeddings", embeddings, methods=["POST"], response_model=EmbeddingsResponse)
    app.add_api_route("/v1/models", models, methods=["GET"])
    for path in ("/health", "/livez", "/readyz"):
        app.add_api_route(path, health, methods=["GET"])
    return app


def _require_bundled(model: str, dimensions: int) -> None:
    """Another name would be served with the wrong vectors, and every vector store would keep it."""
    for name, value, held in (("MODEL", model, BUNDLED_MODEL), ("DIMENSIONS", dimensions, BUNDLED_DIMENSIONS)):
        if value != held:
            raise InvalidRequest(
                f"PARAMPARA_EMBEDDER__{name} is {value!r}, but this embedder holds {BUNDLED_MODEL} with {BUNDLED_DIMENSIONS} dimensions "
                "and nothing else. Serve the other model with vLLM or TEI and name its address in PARAMPARA_GATEWAY__EMBEDDER_URL.",
                param=f"embedder.{name.lower()}",
            )


async def embeddings(request: Request, body: EmbeddingsRequest) -> JSONResponse:
    """Embed one or more texts into unit vectors."""
    started = time.perf_counter()
    state = request.app.state
    if body.model != state.model_name:
        raise NotFound(
            f"The model {body.model!r} is not here; this embedder serves {state.model_name!r}.", param="model", code="model_not_found"
        )
    if body.dimensions not in (None, state.encoder.dimensions):
        raise InvalidRequest(
            f"dimensions is {body.dimensions}, but {state.model_name} has {state.encoder.dimensions} and can not be shortened.",
            param="dimensions",
        )
    token_lists = await state.batcher.tokenize(body.texts())
    tokens = sum(map(len, token_lists))
    if tokens > MAX_TOKENS:
        raise InvalidRequest(f"input has {tokens} tokens; the limit per request is {MAX_TOKENS}.", param="input")
    vectors = await state.batcher.encode(token_lists)
    REQUESTS.inc()
    TOKENS.inc(tokens)
    SECONDS.observe(time.perf_counter() - started)
    return JSONResponse(_answer(body, vectors, tokens).model_dump())


def _answer(body: EmbeddingsRequest, vectors: numpy.ndarray, tokens: int) -> EmbeddingsResponse:
    data = [Embedding(index=index, embedding=_encoded(vector, body.encoding_format)) for index, vector in enumerate(vectors)]
    return EmbeddingsResponse(data=data, model=body.model, usage=Usage(prompt_tokens=tokens, total_tokens=tokens))


def _encoded(vector: numpy.ndarray, form: str) -> list[float] | str:
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def models(request: Request) -> EmbeddingModels:
    """The one model this service embeds with."""
    return EmbeddingModels(data=[EmbeddingModel(id=request.app.state.model_name)])


def health(request: Request) -> dict[str, object]:
    """200 once the model is loaded."""
    encoder = getattr(request.app.state, "encoder", None)
    if encoder is None:
        raise Unavailable("The embedding model is still loading.")
    return {"status": "ok", "model": request.app.state.model_name, "dimensions": encoder.dimensions, "window": encoder.window}


def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
