"""Stage ingest against the real embedder, served over HTTP by its own command."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ingestor import ingest
from ingestor.embedding import EmbeddingClient
from ingestor.tokens import estimate_tokens
from parampara.errors import InvalidData, InvalidRequest, Preempted, Unavailable
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.ingest import IngestConfig, IngestDocument, IngestResult
from tests.conftest import free_port
from tests.gateway.servers import EMBEDDING_MODEL, embedder_url

__all__ = ["embedder_url"]
FILE = "file-" + "a" * 24


def document(tmp_path: Path, name: str, content: bytes, number: int = 0) -> IngestDocument:
    path = tmp_path / name
    path.write_bytes(content)
    return IngestDocument(file_id=f"file-{number:024x}", filename=name, path=path)


def config(url: str, *documents: IngestDocument, **change: Any) -> IngestConfig:
    fields = {"chunk_tokens": 100, "chunk_overlap_tokens": 20, **change}
    return IngestConfig(vector_store_id="vs_1", documents=list(documents), embedder_url=url, embedding_model=EMBEDDING_MODEL, **fields)


def run(config: IngestConfig, workdir: Path) -> IngestResult:
    return ingest.run(config, workdir=workdir, progress=SilentProgress())


def lines(result: IngestResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (result.output / "chunks.jsonl").read_text(encoding="utf-8").splitlines()]


BOOK = "\n\n".join(f"Rule {n}. The sub lord of cusp {n} decides its promise. Bhav {n} ka sub lord uska phal batata hai." for n in range(60))


def test_a_book_becomes_chunks_with_vectors(tmp_path: Path, embedder_url: str) -> None:
    book = document(tmp_path, "kp.md", BOOK.encode())
    result = run(config(embedder_url, book), tmp_path / "work")
    rows = lines(result)
    assert (result.documents, result.chunks, result.failed) == (1, len(rows), {})
    assert [row["position"] for row in rows] == list(range(len(rows)))
    assert set(rows[0]) == {"file_id", "filename", "position", "page", "text", "tokens", "embedding"}
    assert all(row["tokens"] <= 100 and row["filename"] == "kp.md" for row in rows)
    assert all(abs(math.hypot(*row["embedding"]) - 1) < 1e-4 and len(row["embedding"]) == 384 for row in rows)
    assert all(f"cusp {n} decides" in " ".join(row["text"] for row in rows) for n in range(60))
    assert result.output == tmp_path / "work" / "output"


def test_a_document_that_can_not_be_read_is_recorded_and_the_others_go_on(tmp_path: Path, embedder_url: str) -> None:
    good = document(tmp_path, "good.txt", b"Mars rules Mrigashira.", 1)
    bad = document(tmp_path, "bad.pdf", b"not a pdf", 2)
    empty = document(tmp_path, "empty.txt", b"", 3)
    gone = IngestDocument(file_id="file-" + "4" * 24, filename="gone.txt", path=tmp_path / "gone.txt")
    result = run(config(embedder_url, bad, good, empty, gone), tmp_path / "work")
    assert [row["file_id"] for row in lines(result)] == [good.file_id]
    assert set(result.failed) == {bad.file_id, empty.file_id, gone.file_id}
    assert "bad.pdf" in result.failed[bad.file_id]


def test_all_failing_fails_the_stage(tmp_path: Path, embedder_url: str) -> None:
    with pytest.raises(InvalidData, match=r"None of the 1 documents could be read: .*empty\.txt"):
        run(config(embedder_url, document(tmp_path, "empty.txt", b"")), tmp_path / "work")
    assert not (tmp_path / "work" / "output").exists()


def test_an_overlap_above_half_is_refused(tmp_path: Path) -> None:
    book = document(tmp_path, "kp.md", b"text")
    with pytest.raises(InvalidRequest, match="at most half"):
        run(config("http://127.0.0.1:9", book, chunk_overlap_tokens=51), tmp_path / "work")


def test_a_stopped_stage_keeps_finished_documents(tmp_path: Path, embedder_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    books = [document(tmp_path, f"{n}.txt", f"Text number {n}.".encode(), n) for n in range(3)]
    real, sent = EmbeddingClient.embed, []

    def embed_then_stop(self: EmbeddingClient, texts: Any) -> Any:
        sent.extend(texts)
        if len(sent) == 2:
            stop.request()
        return real(self, texts)

    monkeypatch.setattr(EmbeddingClient, "embed", embed_then_stop)
    try:
        with pytest.raises(Preempted):
            run(config(embedder_url, *books), tmp_path / "work")
    finally:
        stop.clear()
    result = run(config(embedder_url, *books), tmp_path / "work")
    assert sent == ["Text number 0.", "Text number 1.", "Text number 2."]
    assert [row["text"] for row in lines(result)] == sent


def test_an_embedder_that_starts_late_is_waited_for(flaky_embedder: tuple[str, list[int]]) -> None:
    url, answers = flaky_embedder
    answers[:] = [503, 429, 200]
    with EmbeddingClient(url, "m", patience_seconds=10) as client:
        assert client.embed(["a"]) == [[1.0]]
    assert answers == []


def test_an_embedder_that_is_away_is_named(tmp_path: Path) -> None:
    port = free_port()
    with EmbeddingClient(f"http://127.0.0.1:{port}", "m", patience_seconds=0.3) as client, pytest.raises(Unavailable, match=str(port)):
        client.embed(["a"])


def test_a_refusal_is_not_repeated(flaky_embedder: tuple[str, list[int]]) -> None:
    url, answers = flaky_embedder
    answers[:] = [400, 200]
    with EmbeddingClient(url, "m") as client, pytest.raises(InvalidData, match="400"):
        client.embed(["a"])
    assert answers == [200]


def test_the_token_estimate_keeps_auto_chunks_inside_the_window() -> None:
    """200 estimated tokens have to fit the 254 that the default model sees, in English and in romanised Hindi alike."""
    from embedder.model import SentenceEncoder, bundled_model_dir
    from parampara.datasets.chunks import chunk_text

    encoder = SentenceEncoder(bundled_model_dir())
    english = "The cuspal sub lord of the seventh bhava, as significator of two, seven and eleven, promises marriage. "
    hinglish = "Saptam bhav ka upnakshatra swami agar doosre, saatve ya gyaarahve bhav ka karak ho to vivah ka yog banta hai. "
    for text in (english * 60, hinglish * 60, (english + hinglish) * 30):
        for chunk in chunk_text(text, max_tokens=200, count_tokens=estimate_tokens, overlap_tokens=40):
            assert len(encoder.tokenize([chunk])[0]) <= encoder.window - 2, chunk


@pytest.fixture
def flaky_embedder() -> Iterator[tuple[str, list[int]]]:
    """An HTTP server that answers with the next status of a list."""
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            status = answers.pop(0)
            body = json.dumps({"data": [{"index": 0, "embedding": [1.0]}]}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    server.server_close()
