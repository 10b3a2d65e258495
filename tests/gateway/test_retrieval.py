"""Grounded chat: passages before the model, citations behind it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from parampara.db.models import Alias, VectorStore
from tests.gateway.conftest import MODEL, Running
from tests.gateway.library import platform, store

__all__ = ["platform", "store"]


def test_a_store_of_another_embedding_model_is_refused(platform: Running, store: str) -> None:
    with platform.sessions.begin() as session:
        session.get_one(VectorStore, store).embedding_model = "older-model"
    response = platform.ask()
    assert response.status_code == 400
    assert "older-model" in response.json()["error"]["message"]


def test_chat_is_grounded_and_cites_what_the_model_cited(platform: Running, store: str) -> None:
    platform.script.text = "Answer: 7 years [1]\nRule: Vimshottari [9]"
    answer = platform.sdk.chat.completions.create(model="kp", messages=[{"role": "user", "content": "How many years does Ketu rule?"}])
    message = answer.choices[0].message
    assert message.content == "Answer: 7 years [1]\nRule: Vimshottari"
    assert message.annotations is not None
    [citation] = message.annotations
    assert message.content[citation.url_citation.start_index : citation.url_citation.end_index] == "[1]"
    assert citation.url_citation.title == "dasha.md"
    assert citation.url_citation.url.startswith(f"{platform.url}/v1/files/file-")
    context: dict[str, Any] = message.to_dict()["context"]  # type: ignore[assignment]
    first = context["citations"][0]
    assert (first["index"], first["cited"], first["attributed_by"], first["filename"]) == (1, True, "model", "dasha.md")
    assert "Ketu rules for seven years" in first["text"]
    [system, question] = platform.script.last["messages"]
    assert system["role"] == "system"
    assert "[1] " in system["content"]
    assert "Ketu rules for seven years" in system["content"]
    assert question["content"] == "How many years does Ketu rule?"
    assert answer.model == MODEL


def test_a_streamed_grounded_answer(platform: Running, store: str) -> None:
    platform.script.text = "Shaadi ka vaada hota hai [1][7]. Agle [2, 8] dekhein"
    stream = platform.sdk.chat.completions.create(
        model="kp", stream=True, messages=[{"role": "user", "content": "shaadi ka vaada kab hota hai?"}]
    )
    chunks = [chunk.to_dict()["choices"][0] for chunk in stream]  # type: ignore[index]
    text = "".join(chunk["delta"].get("content") or "" for chunk in chunks)  # type: ignore[union-attr]
    assert text == "Shaadi ka vaada hota hai [1]. Agle [2] dekhein"
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]  # type: ignore[index]
    [citing] = [chunk["delta"] for chunk in chunks if "annotations" in chunk["delta"]]  # type: ignore[operator]
    assert citing == chunks[-2]["delta"]  # type: ignore[index]
    cited = [entry["url_citation"] for entry in citing["annotations"]]
    assert [text[entry["start_index"] : entry["end_index"]] for entry in cited] == ["[1]", "[2]"]
    assert citing["context"]["citations"][0]["filename"] == "marriage.md"


def test_where_the_model_cites_nothing_the_gateway_attributes(platform: Running, store: str) -> None:
    platform.script.text = "Ketu rules for seven years in the Vimshottari cycle.\nConfidence: High"
    message = platform.ask("How many years does Ketu rule?").json()["choices"][0]["message"]
    [annotation] = message["annotations"]
    assert annotation["attributed_by"] == "gateway"
    place = annotation["url_citation"]
    assert message["content"][place["start_index"] : place["end_index"]] == "Ketu rules for seven years in the Vimshottari cycle."
    assert place["title"] == "dasha.md"


def test_the_file_search_tool_and_switching_it_off(platform: Running, store: str) -> None:
    with platform.sessions.begin() as session:
        session.get_one(Alias, "kp").vector_store_id = None
    time.sleep(0.6)
    tool = {"type": "file_search", "vector_store_ids": [store], "max_num_results": 1}
    grounded = platform.ask("foreign travel?", tools=[tool], tool_choice="required")
    assert [entry["filename"] for entry in grounded.json()["choices"][0]["message"]["context"]["citations"]] == ["travel.md"]
    assert "tools" not in platform.script.last
    for change in ({"tools": [tool], "tool_choice": "none"}, {}):
        plain = platform.ask("foreign travel?", **change)
        assert "context" not in plain.json()["choices"][0]["message"]
        assert len(platform.script.last["messages"]) == 1
    for change, param in [({"max_num_results": 0}, "max_num_results"), ({"vector_store_ids": []}, "vector_store_ids"), ({"x": 1}, "x")]:
        response = platform.ask(tools=[{**tool, **change}])
        assert (response.status_code, response.json()["error"]["param"]) == (400, f"tools.file_search.{param}")


def test_passages_that_do_not_fit_are_dropped_from_the_end(platform: Running, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream._INFO_SECONDS", 0.0)  # a window is remembered for ten seconds
    everything = platform.ask("years of Ketu", max_tokens=50).json()["choices"][0]["message"]["context"]
    assert everything["dropped"] == 0
    shown = []
    for window in (190, 150, 110, 70):
        platform.script.window = window
        context = platform.ask("years of Ketu", max_tokens=40).json()["choices"][0]["message"]["context"]
        sent = platform.script.last
        used = sum(4 + platform.script.tokens(entry["content"]) for entry in sent["messages"])
        assert used + min(40, window // 2) <= window
        assert sent["max_tokens"] == min(40, window - used)
        assert context["dropped"] + len(context["citations"]) == len(everything["citations"])
        assert [entry["chunk_id"] for entry in context["citations"]] == [
            entry["chunk_id"] for entry in everything["citations"][: len(context["citations"])]
        ]
        shown.append(len(context["citations"]))
    assert shown == sorted(shown, reverse=True)
    assert shown[0] > shown[-1] == 0
    too_long = platform.ask("years of Ketu " * 50)
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_retrieval_that_fails_is_told_and_not_silently_left_out(platform: Running, store: str) -> None:
    platform.settings.gateway.embedder_url = "http://127.0.0.1:9"
    response = platform.ask()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "retrieval_unavailable")
    assert platform.ask(tool_choice="none").status_code == 200
