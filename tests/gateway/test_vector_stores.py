"""``/v1/vector_stores`` through the real SDK, and searching them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import openai
import pytest
import redis
from sqlalchemy import func, select

from parampara.db.models import Alias, Chunk, File, Job, Outbox, VectorStore, VectorStoreFile
from tests.gateway.conftest import Running
from tests.gateway.library import BOOKS, DASHA, TRAVEL, add_file, platform, run_ingest_jobs, store

__all__ = ["platform", "store"]


def test_the_life_of_a_store_with_the_sdk(platform: Running) -> None:
    stores = platform.sdk.vector_stores
    made = stores.create(name="a", metadata={"topic": "kp"})
    assert (made.name, made.status, made.file_counts.total, made.metadata) == ("a", "completed", 0, {"topic": "kp"})
    others = [stores.create(name=str(number)).id for number in range(4)]
    assert stores.update(made.id, name="b").name == "b"
    assert stores.retrieve(made.id).name == "b"
    assert [entry.id for entry in stores.list(limit=2)] == [*others[::-1], made.id]
    assert [entry.id for entry in stores.list(limit=2, order="asc")] == [made.id, *others]
    assert [entry.id for entry in stores.list(before=others[0], order="desc", limit=2).data] == [others[2], others[1]]
    assert stores.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        stores.retrieve(made.id)
    assert made.id not in {entry.id for entry in stores.list()}


def test_attaching_a_file_queues_a_job_and_its_end_brings_the_chunks(platform: Running, tmp_path: Path) -> None:
    file_id, files = add_file(platform, "dasha.md", DASHA), platform.sdk.vector_stores.files
    store = platform.sdk.vector_stores.create()
    attached = files.create(store.id, file_id=file_id, attributes={"page": "12", "year": 1971})
    assert (attached.status, attached.attributes) == ("in_progress", {"page": "12", "year": 1971.0})
    assert attached.chunking_strategy.static.max_chunk_size_tokens == 200  # type: ignore[union-attr]
    assert platform.sdk.vector_stores.retrieve(store.id).status == "in_progress"
    with platform.sessions() as session:
        assert session.scalar(select(func.count()).select_from(Outbox)) == 1
    again = files.create(store.id, file_id=file_id)  # the SDK repeats a request whose answer was lost
    assert again.to_dict()["parampara"] == attached.to_dict()["parampara"]
    run_ingest_jobs(platform, tmp_path / "work")
    done = files.poll(file_id, vector_store_id=store.id)
    assert (done.status, done.last_error) == ("completed", None)
    assert done.usage_bytes > 0
    assert "Ketu rules for seven years" in " ".join(part.text or "" for part in files.content(file_id, vector_store_id=store.id))
    assert files.update(file_id, vector_store_id=store.id, attributes={"page": "13"}).attributes == {"page": "13"}
    assert [entry.id for entry in files.list(store.id, filter="completed")] == [file_id]
    assert files.delete(file_id, vector_store_id=store.id).deleted
    with platform.sessions() as session:
        assert session.scalar(select(func.count()).select_from(Chunk)) == 0


def test_the_doorbell_rings_for_an_attached_file(platform: Running) -> None:
    """The message reaches the real Redis, after the commit."""
    file_id, store = add_file(platform, "dasha.md", DASHA), platform.sdk.vector_stores.create()
    platform.sdk.vector_stores.files.create(store.id, file_id=file_id)
    with redis.Redis.from_url(platform.settings.redis.url) as broker:
        deadline = time.monotonic() + 20
        while broker.llen("ingest") == 0:
            assert time.monotonic() < deadline, "no doorbell"
            time.sleep(0.05)


def test_batches_with_the_sdk(platform: Running, tmp_path: Path) -> None:
    good, bad = add_file(platform, "dasha.md", DASHA), add_file(platform, "empty.txt", "")
    store, batches = platform.sdk.vector_stores.create(), platform.sdk.vector_stores.file_batches
    batch = batches.create(store.id, file_ids=[good, bad], attributes={"part": "one"})
    assert (batch.status, batch.file_counts.in_progress) == ("in_progress", 2)
    run_ingest_jobs(platform, tmp_path / "work")
    done = batches.retrieve(batch.id, vector_store_id=store.id)
    assert (done.status, done.file_counts.completed, done.file_counts.failed) == ("completed", 1, 1)
    listed = {entry.id: entry for entry in batches.list_files(batch.id, vector_store_id=store.id)}
    error = listed[bad].last_error
    assert error is not None
    assert "empty.txt" in error.message
    assert listed[good].attributes == {"part": "one"}


def test_a_batch_is_cancelled(platform: Running) -> None:
    store, batches = platform.sdk.vector_stores.create(), platform.sdk.vector_stores.file_batches
    batch = batches.create(store.id, file_ids=[add_file(platform, "dasha.md", DASHA)])
    assert batches.cancel(batch.id, vector_store_id=store.id).status == "cancelled"
    assert [entry.status for entry in platform.sdk.vector_stores.files.list(store.id)] == ["cancelled"]


def test_deleting_a_store_takes_chunks_and_jobs_with_it(platform: Running, store: str) -> None:
    refused = platform.http.delete(f"/v1/vector_stores/{store}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "wrong_state")
    queued = add_file(platform, "more.md", TRAVEL)
    platform.sdk.vector_stores.files.create(store, file_id=queued)
    with platform.sessions.begin() as session:
        session.get_one(Alias, "kp").vector_store_id = None
    assert platform.sdk.vector_stores.delete(store).deleted
    with platform.sessions() as session:
        assert session.scalar(select(func.count()).select_from(Chunk)) == 0
        assert session.scalar(select(func.count()).select_from(VectorStoreFile)) == 0
        assert set(session.scalars(select(Job.state))) == {"succeeded", "cancelled"}


def test_bad_requests_name_the_field(platform: Running) -> None:
    store = platform.sdk.vector_stores.create().id
    chunking = {"type": "static", "static": {"max_chunk_size_tokens": 100, "chunk_overlap_tokens": 51}}
    cases: list[tuple[str, dict[str, Any], int, str]] = [
        ("", {"nam": "x"}, 400, "nam"),
        ("", {"metadata": {"k": "v" * 513}}, 400, "metadata"),
        ("", {"description": "x"}, 400, "description"),
        ("", {"file_ids": ["file-nothing"]}, 404, "file_id"),
        (f"/{store}/files", {"file_id": "file-nothing"}, 404, "file_id"),
        (f"/{store}/files", {"file_id": "x", "chunking_strategy": chunking}, 400, "chunking_strategy"),
        (f"/{store}/files", {"file_id": "x", "attributes": {str(n): 1 for n in range(17)}}, 400, "attributes"),
        (f"/{store}/file_batches", {}, 400, "None"),
        (f"/{store}/search", {"query": ""}, 400, "query"),
        (f"/{store}/search", {"query": "a", "max_num_results": 51}, 400, "max_num_results"),
        (f"/{store}/search", {"query": "a", "filters": {"type": "like", "key": "k", "value": "v"}}, 400, "filters.type"),
        (f"/{store}/search", {"query": "a", "ranking_options": {"score_threshold": 2}}, 400, "ranking_options.score_threshold"),
        ("/vs_nothing/search", {"query": "a"}, 404, "vector_store_ids"),
        ("/vs_nothing/files", {"file_id": "x"}, 404, "vector_store_id"),
    ]
    for path, body, status, param in cases:
        response = platform.http.post(f"/v1/vector_stores{path}", json=body)
        assert response.status_code == status, (body, response.text)
        assert str(response.json()["error"]["param"]).startswith(param), (body, response.text)
    with platform.sessions() as session:
        assert session.scalar(select(func.count()).select_from(VectorStore)) == 1


def test_searching_with_the_sdk(platform: Running, store: str) -> None:
    found = platform.sdk.vector_stores.search(store, query="How many years does Ketu rule?", max_num_results=2)
    assert found.data[0].filename == "dasha.md"
    assert "seven years" in found.data[0].content[0].text
    assert len(found.data) == 2
    assert 0 < found.data[0].score <= 1
    both = platform.sdk.vector_stores.search(store, query=["foreign travel", "marriage promised"], max_num_results=2)
    assert {result.filename for result in both} == {"travel.md", "marriage.md"}
    scores = [result.score for result in platform.sdk.vector_stores.search(store, query="foreign travel", max_num_results=50)]
    best, second, *_ = sorted(scores, reverse=True)
    ranking: Any = {"score_threshold": (best + second) / 2, "ranker": "auto"}
    strict = platform.sdk.vector_stores.search(store, query="foreign travel", ranking_options=ranking)
    assert [result.filename for result in strict] == ["travel.md"]


def test_meaning_and_words_both_count(platform: Running, store: str, tmp_path: Path) -> None:
    rare = add_file(platform, "rare.md", "Zyxgrantha is the name of a palm-leaf manuscript about trees.")
    platform.sdk.vector_stores.files.create(store, file_id=rare)
    run_ingest_jobs(platform, tmp_path / "more")
    query = "How long do planets govern a life? Zyxgrantha"

    def found(embedding: float, text: float) -> list[str]:
        options = {"hybrid_search": {"embedding_weight": embedding, "text_weight": text}}
        body = {"query": query, "ranking_options": options, "max_num_results": 50}
        return [entry["filename"] for entry in platform.http.post(f"/v1/vector_stores/{store}/search", json=body).json()["data"]]

    by_meaning, by_words = found(1, 0), found(0, 1)
    assert (by_meaning[0], by_words[0]) == ("dasha.md", "rare.md")
    assert set(by_meaning) == {*BOOKS, "rare.md"}
    assert platform.sdk.vector_stores.search(store, query=query).data[0].filename == "rare.md"
    assert found(0.1, 10)[0] == "rare.md"
    assert found(10, 0.1)[0] == "dasha.md"


def test_hinglish_questions_find_the_right_passage(platform: Running, store: str) -> None:
    for question in ("shaadi ka vaada kab hota hai?", "saptam bhav ka sublord shaadi batata hai kya"):
        [best] = platform.sdk.vector_stores.search(store, query=question, max_num_results=1)
        assert best.filename == "marriage.md", question


def test_filters(platform: Running, store: str) -> None:
    with platform.sessions.begin() as session:
        names: dict[str, str] = {row.id: row.filename for row in session.scalars(select(File))}
        attributes = {"dasha.md": {"part": 1, "kind": "time"}, "marriage.md": {"part": 2, "kind": "event"}, "travel.md": {"kind": "event"}}
        for row in session.scalars(select(VectorStoreFile)):
            row.attributes = attributes[names[row.file_id]]

    def found(**wanted: Any) -> set[str]:
        filters: Any = wanted
        return {
            result.filename
            for result in platform.sdk.vector_stores.search(store, query="houses and years", filters=filters, max_num_results=50)
        }  # type: ignore[arg-type]

    everything = set(BOOKS)
    assert found(type="eq", key="kind", value="event") == {"marriage.md", "travel.md"}
    assert found(type="eq", key="part", value=1) == {"dasha.md"}
    assert found(type="ne", key="part", value=1) == {"marriage.md", "travel.md"}
    assert found(type="gte", key="part", value=1.5) == {"marriage.md"}
    assert found(type="lt", key="kind", value="f") == {"marriage.md", "travel.md"}
    assert found(type="in", key="part", value=[1, 2]) == {"dasha.md", "marriage.md"}
    assert found(type="nin", key="part", value=[1, 2]) == {"travel.md"}
    event, first = {"type": "eq", "key": "kind", "value": "event"}, {"type": "eq", "key": "part", "value": 1}
    assert found(type="or", filters=[event, first]) == everything
    assert found(type="and", filters=[event, first]) == set()
    assert found(type="eq", key="'; DROP TABLE chunks; --", value="x") == set()
