"""Chunking and held-out split: nothing lost, nothing above the limit, nothing on both sides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parampara.datasets import Document, Page, chunk_document, chunk_text, hold_out
from parampara.errors import InvalidData, InvalidRequest

WORDS = st.lists(
    st.sampled_from(["Ketu", "rules.", "seven", "years!", "Kya", "hai?", "x" * 40, "\n", "\n\n", "।"]), min_size=1, max_size=200
)


def words(text: str) -> int:
    return len(text.split())


def characters(text: str) -> int:
    return (len(text) + 2) // 3


def test_chunks_end_at_sentences_and_prefer_paragraphs() -> None:
    text = "One two three. Four five six.\n\nSeven eight. Nine ten eleven twelve. Thirteen."
    assert chunk_text(text, max_tokens=8, count_tokens=words) == [
        "One two three. Four five six.",
        "Seven eight. Nine ten eleven twelve. Thirteen.",
    ]


def test_overlap_repeats_whole_sentences() -> None:
    text = "A b c. D e. F g h. I j. K l m."
    assert chunk_text(text, max_tokens=6, count_tokens=words, overlap_tokens=2) == ["A b c. D e.", "D e. F g h.", "I j. K l m."]


def test_a_chunk_carries_the_page_it_starts_on() -> None:
    document = Document(title="Book", pages=[Page("7", "One two. Three four."), Page("8", "Five six. Seven eight.")])
    chunks = chunk_document(document, max_tokens=4, count_tokens=words)
    assert [(chunk.page, chunk.document, chunk.tokens) for chunk in chunks] == [("7", "Book", 4), ("8", "Book", 4)]


def test_abbreviations_inside_a_sentence_do_not_cut() -> None:
    assert chunk_text("at 13.20 deg. of arc it ends. Then more words come here.", max_tokens=7, count_tokens=words) == [
        "at 13.20 deg. of arc it ends.",
        "Then more words come here.",
    ]


@settings(max_examples=200, deadline=None)
@given(parts=WORDS, limit=st.integers(3, 60), overlap=st.integers(0, 20), counter=st.sampled_from([words, characters]))
def test_every_character_is_kept_in_order_and_no_chunk_is_too_long(parts: list[str], limit: int, overlap: int, counter: object) -> None:
    text = " ".join(parts)
    count = words if counter is words else characters
    chunks = chunk_text(text, max_tokens=limit, count_tokens=count)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert all(count(chunk) <= limit for chunk in chunks)
    overlapping = chunk_text(text, max_tokens=limit, count_tokens=count, overlap_tokens=min(overlap, limit - 1))
    assert all(count(chunk) <= limit for chunk in overlapping)
    assert len(overlapping) >= len(chunks) or overlap
    remaining = iter("".join(text.split()))
    for chunk in chunks:
        assert all(next(remaining) == letter for letter in "".join(chunk.split()))


@pytest.mark.parametrize(("limit", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_impossible_limits_are_refused(limit: int, overlap: int) -> None:
    with pytest.raises(InvalidRequest):
        chunk_text("a b c", max_tokens=limit, count_tokens=words, overlap_tokens=overlap)


def split(items: list[str], *, fraction: float = 0.2, seed: int = 1) -> tuple[list[str], list[str]]:
    return hold_out(items, fraction=fraction, seed=seed, content=lambda text: text)


@settings(max_examples=100, deadline=None)
@given(items=st.lists(st.text(max_size=5), min_size=2, max_size=60), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 99))
def test_split_never_overlaps_and_fills_both_sides(items: list[str], fraction: float, seed: int) -> None:
    distinct = {" ".join(item.casefold().split()) for item in items}
    if len(distinct) < 2:
        with pytest.raises(InvalidData):
            split(items, fraction=fraction, seed=seed)
        return
    train, held = split(items, fraction=fraction, seed=seed)
    assert train and held and sorted(train + held) == sorted(items)
    assert not {" ".join(t.casefold().split()) for t in train} & {" ".join(h.casefold().split()) for h in held}


def test_split_does_not_depend_on_order_and_follows_the_seed() -> None:
    items = [f"row {i}" for i in range(100)]
    train, held = split(items)
    assert len(held) == 20
    assert set(split(items[::-1])[1]) == set(held)
    assert set(split(items, seed=2)[1]) != set(held)
    assert split(items) == (train, held)
