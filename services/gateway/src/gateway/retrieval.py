"""From a question to passages: what to search where, one call to the embedder, one statement to the database."""

from __future__ import annotations

import base64
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
from sqlalchemy import select
from sqlalchemy.orm import Session

from gateway import metrics
from gateway.database import Database
from gateway.fields import shown
from gateway.filters import compile_filter
from gateway.search import Passage, Weights, search
from gateway.upstream import calling, error_of
from parampara.db.models import VectorStore
from parampara.errors import InvalidRequest, NotFound, ParamparaError, Unavailable, WrongState
from parampara.settings import Settings

MAX_STORES = 8
MAX_RESULTS = 50
MAX_QUERY_CHARACTERS = 8000
_EMBED_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=2)


@dataclass(frozen=True)
class SearchPlan:
    """Where and how to search."""

    vector_store_ids: tuple[str, ...]
    limit: int
    filters: Mapping[str, Any] | None = None
    min_score: float = 0.0
    weights: Weights | None = None


def plan_of_tool(tool: Mapping[str, Any], *, attached: str | None, limit: int) -> SearchPlan:
    """The plan of a ``file_search`` tool; without ``vector_store_ids`` it searches what is attached to the alias.

    Raises:
        InvalidRequest: a field is wrong or unknown.
    """
    where = "tools.file_search"
    _refuse_unknown(tool, ("type", "vector_store_ids", "max_num_results", "filters", "ranking_options"), where)
    stores = tool.get("vector_store_ids") or ([attached] if attached else [])
    if not isinstance(stores, list) or not 0 < len(stores) <= MAX_STORES or not all(isinstance(store, str) for store in stores):
        raise InvalidRequest(f"{where}.vector_store_ids must list 1 to {MAX_STORES} ids.", param=f"{where}.vector_store_ids")
    asked = tool.get("max_num_results")
    return SearchPlan(
        vector_store_ids=tuple(stores),
        limit=limit if asked is None else whole_number(asked, 1, MAX_RESULTS, f"{where}.max_num_results"),
        filters=tool.get("filters"),
        **ranking(tool.get("ranking_options"), f"{where}.ranking_options"),
    )


def ranking(options: Any, where: str) -> dict[str, Any]:
    """``min_score`` and ``weights`` out of OpenAI's ``ranking_options``.

    Raises:
        InvalidRequest: a field is wrong or unknown.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise InvalidRequest(f"{where} must be an object.", param=where)
    _refuse_unknown(options, ("ranker", "score_threshold", "hybrid_search"), where)
    if options.get("ranker") not in (None, "auto", "none", "default-2024-11-15"):
        raise InvalidRequest(f"{where}.ranker must be auto, none or default-2024-11-15.", param=f"{where}.ranker")
    found: dict[str, Any] = {"min_score": _fraction(options.get("score_threshold"), f"{where}.score_threshold")}
    hybrid = options.get("hybrid_search")
    if hybrid is not None:
        where = f"{where}.hybrid_search"
        if not isinstance(hybrid, dict):
            raise InvalidRequest(f"{where} must be an object.", param=where)
        _refuse_unknown(hybrid, ("embedding_weight", "text_weight"), where)
        weights = Weights(*(_fraction(hybrid.get(name), f"{where}.{name}", high=1000) for name in ("embedding_weight", "text_weight")))
        if weights.embedding + weights.text <= 0:
            raise InvalidRequest(f"{where}: one of embedding_weight and text_weight must be above 0.", param=where)
        found["weights"] = weights
    return found


class Retriever:
    def __init__(self, client: aiohttp.ClientSession, database: Database, settings: Settings) -> None:
        self._client, self._database, self._settings = client, database, settings

    async def find(self, query: str, plan: SearchPlan) -> list[Passage]:
        """The best passages for ``query``, best first.

        Raises:
            NotFound: a vector store does not exist.
            InvalidRequest: the filters are wrong.
            Unavailable: the embedder is away. Answering without the passages would be a different answer.
        """
        condition = None if plan.filters is None else compile_filter(plan.filters)
        started = time.perf_counter()
        query = query.replace("\x00", " ")[:MAX_QUERY_CHARACTERS]
        [embedding] = await self.embed([query]) if query.strip() else [[]]

        def work(session: Session) -> list[Passage]:
            check_stores(session, plan.vector_store_ids, self._settings.embedder.model)
            if not embedding:
                return []
            return search(
                session,
                vector_store_ids=plan.vector_store_ids,
                query=query,
                embedding=embedding,
                limit=plan.limit,
                condition=condition,
                min_score=plan.min_score,
                weights=plan.weights,
            )

        found = await self._database.run(work)
        metrics.RETRIEVAL.observe(time.perf_counter() - started)
        return found

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Vectors of ``texts`` from the embedding service.

        Raises:
            Unavailable: it is away or failed.
        """
        body = {"model": self._settings.embedder.model, "input": list(texts), "encoding_format": "base64"}
        url = f"{self._settings.gateway.embedder_url.rstrip('/')}/v1/embeddings"
        try:
            async with (
                calling("embedder", "retrieval_unavailable"),
                self._client.post(
                    url, data=orjson.dumps(body), headers={"content-type": "application/json"}, timeout=_EMBED_TIMEOUT
                ) as response,
            ):
                if response.status != 200:
                    raise await error_of(response, "embedder")
                data = orjson.loads(await response.read())["data"]
        except ParamparaError as error:
            raise Unavailable(f"Retrieval is not possible just now: {error.message}", code="retrieval_unavailable") from error
        return [_floats(item["embedding"]) for item in data]


def check_stores(session: Session, ids: Sequence[str], embedding_model: str) -> None:
    """Raises NotFound for a store that does not exist, WrongState for one made with another embedding model."""
    rows = {row.id: row for row in session.scalars(select(VectorStore).where(VectorStore.id.in_(ids), VectorStore.deleted_at.is_(None)))}
    for store_id in ids:
        if store_id not in rows:
            raise NotFound(f"No vector store {store_id[:100]!r}.", param="vector_store_ids", code="vector_store_not_found")
        if rows[store_id].embedding_model != embedding_model:
            raise WrongState(
                f"The vector store {store_id} was made with the embedding model {rows[store_id].embedding_model!r}, but the gateway "
                f"now uses {embedding_model!r}: attach its files to a new store.",
                param="vector_store_ids",
            )


def whole_number(value: Any, low: int, high: int, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{where} must be a whole number from {low} to {high} (got {shown(value)}).", param=where)
    return value


def _fraction(value: Any, where: str, *, high: float = 1.0) -> float:
    if value is None:
        return 0.0
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= high:
        raise InvalidRequest(f"{where} must be a number from 0 to {high:g} (got {shown(value)}).", param=where)
    return float(value)


def _refuse_unknown(value: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in value:
        if key not in known:
            raise InvalidRequest(f"{where}.{key[:100]} is not known here.", param=f"{where}.{key[:100]}", code="unknown_parameter")


def _floats(value: str | list[float]) -> list[float]:
    """One embedding of either form; base64 is little-endian float32."""
    if not isinstance(value, str):
        return value
    numbers = array("f")
    numbers.frombytes(base64.b64decode(value))
    return numbers.tolist()
