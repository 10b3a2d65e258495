"""What is made of an answer."""

from __future__ import annotations

import pytest

from standalone.asking import answer_line, citations_of, normal
from standalone.follow import doing, duration


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Answer: Ketu\nRule: Ashwini is a star of Ketu. [1]\nConfidence: High", "ketu"),
        ("  answer:  2, 6,  11.\nRule: x", "2 6 11"),
        ("Just Venus!", "just venus"),
        ("", ""),
    ],
)
def test_the_answer_line_is_what_counts(text: str, line: str) -> None:
    assert answer_line(text) == line


def test_degrees_are_kept_apart_from_minutes() -> None:
    assert normal("13°20' Aries") != normal("1320 Aries")


def test_the_rich_form_tells_cited_passages_from_merely_retrieved_ones() -> None:
    entry = {"filename": "stars.txt", "page": None, "text": "Ashwini  is\nruled by Ketu.", "attributed_by": "model"}
    rich = [{**entry, "index": 1, "cited": True}, {**entry, "index": 2, "cited": False, "attributed_by": None, "page": "7"}]
    first, second = citations_of({"context": {"citations": rich}, "annotations": []})
    assert (first.marker, first.title, first.text, first.cited) == ("[1]", "stars.txt", "Ashwini is ruled by Ketu.", True)
    assert (second.title, second.cited) == ("stars.txt, page 7", False)


def test_standard_annotations_are_enough() -> None:
    annotation = {"type": "url_citation", "url_citation": {"start_index": 0, "end_index": 3, "url": "http://x", "title": "stars.txt"}}
    assert [citation.title for citation in citations_of({"annotations": [annotation]})] == ["stars.txt"]
    assert citations_of({}) == []


def test_a_stage_in_few_words() -> None:
    job = {
        "status": "running",
        "error": None,
        "reused_from": None,
        "progress": {"phase": "train", "step": 3, "total": 9, "metrics": {"loss": 2.5, "tokens_per_s": 1234.0, "grad_norm": None}},
    }
    assert doing(job) == "train  3/9  loss 2.500  1,234 tokens/s"
    speed = {"tokens_per_s": 8100.0, "mfu": 0.412, "peak_memory_bytes": 22.14e9, "cost": 1.345}
    assert doing({**job, "progress": {**job["progress"], "metrics": speed}}) == "train  3/9  8,100 tokens/s  41% MFU  22.1 GB  cost 1.34"
    assert doing({**job, "status": "failed", "error": {"message": "out of disk"}}) == "out of disk"
    assert doing({**job, "status": "succeeded", "reused_from": "job_1"}) == "reused"


@pytest.mark.parametrize(("seconds", "text"), [(None, ""), (0, "0:00"), (75, "1:15"), (3725.4, "1:02:05")])
def test_durations_read_like_a_clock(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
