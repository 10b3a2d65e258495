"""Retrieval: one SQL statement over pgvector and tsvector, fused by reciprocal rank (Cormack et al. 2009, k = 60).

Meaning alone misses rare names and romanised spellings that the embedding never saw; words alone miss paraphrase. The
lexical half weighs a word by how few passages hold it (idf), so it needs no list of frequent words for any language.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pgvector.sqlalchemy import Vector
from sqlalchemy import ColumnElement, Float, Integer, Select, bindparam, cast, func, select, true
from sqlalchemy.dialects.postgresql import REGCONFIG, TSQUERY, TSVECTOR
from sqlalchemy.orm import Session

from parampara.db.models import Chunk, VectorStoreFile

RRF_K = 60
CANDIDATES = 50
MAX_WORDS = 64
"""The longest words of a question count; a pasted page does not become a thousand look-ups."""


@dataclass(frozen=True)
class Weights:
    """How much each half counts in the fusion; 0 switches a half off."""

    embedding: float = 1.0
    text: float = 1.0


@dataclass(frozen=True)
class Passage:
    chunk_id: int
    vector_store_id: str
    file_id: str
    filename: str
    page: str | None
    position: int
    text: str
    score: float
    """Cosine similarity of question and passage, cut to 0..1; the *order* of passages is the fused rank."""
    attributes: dict[str, Any]


def search(
    session: Session,
    *,
    vector_store_ids: Sequence[str],
    query: str,
    embedding: Sequence[float],
    limit: int,
    condition: ColumnElement[bool] | None = None,
    min_score: float = 0.0,
    weights: Weights | None = None,
) -> list[Passage]:
    """The best ``limit`` passages of the stores, best first. ``condition`` comes from :func:`gateway.filters.compile_filter`."""
    statement = _statement(vector_store_ids, query, embedding, condition, weights or Weights())
    statement = statement.limit(CANDIDATES if min_score > 0 else limit)
    found = [_passage(row) for row in session.execute(statement)]
    return [passage for passage in found if passage.score >= min_score][:limit]


def _statement(
    stores: Sequence[str], query: str, embedding: Sequence[float], condition: ColumnElement[bool] | None, weights: Weights
) -> Select[*tuple[Any, ...]]:
    dimensions = len(embedding)
    vector = bindparam("embedding", list(embedding), type_=Vector(dimensions))
    distance = cast(Chunk.embedding, Vector(dimensions)).cosine_distance(vector)
    in_file = (VectorStoreFile.vector_store_id == Chunk.vector_store_id) & (VectorStoreFile.file_id == Chunk.file_id)
    allowed = Chunk.vector_store_id.in_(stores) & (true() if condition is None else condition)

    near = (
        select(Chunk.id, distance.label("distance"))
        .join(VectorStoreFile, in_file)
        .where(allowed)
        .order_by(distance, Chunk.id)
        .limit(CANDIDATES)
        .cte("near")
    )
    dense = select(near.c.id, func.row_number().over(order_by=(near.c.distance, near.c.id)).label("rank")).cte("dense")
    sparse = _sparse(query, in_file, allowed)
    both = select(dense.c.id).union(select(sparse.c.id)).subquery("both_halves")
    fused = _rank_score(weights.embedding, dense.c.rank) + _rank_score(weights.text, sparse.c.rank)
    return (
        select(Chunk, VectorStoreFile.attributes, distance.label("distance"))
        .join(both, both.c.id == Chunk.id)
        .join(VectorStoreFile, in_file)
        .outerjoin(dense, dense.c.id == Chunk.id)
        .outerjoin(sparse, sparse.c.id == Chunk.id)
        .where(fused > 0)
        .order_by(fused.desc(), distance, Chunk.id)
    )


def _sparse(query: str, in_file: ColumnElement[bool], allowed: ColumnElement[bool]) -> Any:
    """CTE ``(id, rank)`` of passages that share words with the query: the sum of the shared words' idf, as in BM25, decides."""
    config = cast("simple", REGCONFIG)
    lexeme = func.unnest(func.tsvector_to_array(func.to_tsvector(config, bindparam("query", query)))).column_valued("lexeme")
    longest = select(lexeme.label("lexeme")).order_by(func.length(lexeme).desc(), lexeme).limit(MAX_WORDS).subquery("longest")
    words = select(longest.c.lexeme, cast(func.quote_literal(longest.c.lexeme), TSQUERY).label("wanted")).cte("words")
    total = select(func.count()).select_from(Chunk).join(VectorStoreFile, in_file).where(allowed).scalar_subquery()
    # each passage's words are unpacked once (that is what the concatenation does), not once per word of the query
    unpacked = Chunk.words.op("||")(cast("", TSVECTOR)).label("words")
    pool = select(Chunk.id, unpacked).join(VectorStoreFile, in_file).where(allowed).cte("pool").prefix_with("MATERIALIZED")
    hits = (
        select(pool.c.id, func.count().over(partition_by=words.c.lexeme).label("df"))
        .select_from(words)
        .join(pool, pool.c.words.op("@@")(words.c.wanted))
        .cte("hits")
    )
    score = func.sum(func.ln(1 + (total - hits.c.df + 0.5) / (hits.c.df + 0.5)))
    best = select(hits.c.id, score.label("score")).group_by(hits.c.id).order_by(score.desc(), hits.c.id).limit(CANDIDATES).cte("best")
    return select(best.c.id, func.row_number().over(order_by=(best.c.score.desc(), best.c.id)).label("rank")).cte("sparse")


def _rank_score(weight: float, rank: ColumnElement[int]) -> ColumnElement[float]:
    return func.coalesce(cast(weight, Float) / (RRF_K + cast(rank, Integer)), 0.0)


def _passage(row: Any) -> Passage:
    chunk: Chunk = row.Chunk
    return Passage(
        chunk_id=chunk.id,
        vector_store_id=chunk.vector_store_id,
        file_id=chunk.file_id,
        filename=chunk.filename,
        page=chunk.page,
        position=chunk.position,
        text=chunk.text,
        score=round(min(1.0, max(0.0, 1.0 - row.distance)), 6),
        attributes=row.attributes,
    )
