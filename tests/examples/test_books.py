"""The six books and the held-out text: size, independence, and agreement with the computed facts."""

from __future__ import annotations

import re
from pathlib import Path

import kp_system as kp
import pytest
from generate import HERE, sentences

BOOKS = sorted((HERE / "books").glob("*.txt"))
HELD_OUT = sorted((HERE / "books_heldout").glob("*.txt"))
TEXT = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in BOOKS)
NUMBER_WORDS = {"Sun": "the Sun", "Moon": "the Moon"}


def said(path: Path) -> set[str]:
    """Sentences of five words and more, folded."""
    found = [sentence for paragraph in path.read_text(encoding="utf-8").split("\n\n") for sentence in sentences(paragraph)]
    return {" ".join(re.findall(r"\w+", sentence.casefold())) for sentence in found if len(sentence.split()) >= 5}


def named(planet: str) -> str:
    return NUMBER_WORDS.get(planet, planet)


def test_there_are_six_books_of_four_to_ten_kilobytes():
    assert len(BOOKS) == 6
    assert all(4_000 <= path.stat().st_size <= 10_000 for path in BOOKS)
    assert 2_500 <= sum(path.stat().st_size for path in HELD_OUT) <= 10_000


def test_held_out_text_shares_no_sentence_with_the_books():
    training = set().union(*(said(path) for path in BOOKS))
    held = set().union(*(said(path) for path in HELD_OUT))
    assert len(training) > 350
    assert len(held) > 45
    assert not training & held


def test_no_sentence_stands_in_two_books():
    for index, path in enumerate(BOOKS):
        for other in BOOKS[index + 1 :]:
            assert not said(path) & said(other), (path.name, other.name)


@pytest.mark.parametrize("star", kp.NAKSHATRAS)
def test_catalogue_of_stars_is_right(star):
    number, (start, end) = kp.NAKSHATRAS.index(star) + 1, kp.star_span(star)
    entry = next(text for text in BOOKS[1].read_text(encoding="utf-8").split("\n\n") if text.startswith(f"{number}. {star}. "))
    signs = [kp.SIGNS[start // kp.SIGN_LENGTH], kp.SIGNS[(end - 1) // kp.SIGN_LENGTH]]
    inside = [kp.dms(start % kp.SIGN_LENGTH), kp.dms(end - kp.SIGNS.index(signs[1]) * kp.SIGN_LENGTH)]
    assert f"from {inside[0]} {signs[0]} to {inside[1]} {signs[1]}" in entry
    assert re.search(rf"(lord is|ruled by|lord of {star} is) {named(kp.STAR_LORDS[star])}\.", entry)


def test_lengths_of_subs_are_right():
    for lord in kp.LORDS:
        said_length = re.search(rf"The sub of {named(lord)} measures ([^,.]+)", TEXT)
        assert said_length
        degrees, minutes, seconds = (
            int(found[1]) if (found := re.search(rf"(\d+) {unit}", said_length[1])) else 0 for unit in ("degree", "minute", "second")
        )
        assert degrees * 3600 + minutes * 60 + seconds == kp.sub_length(lord)


def test_hinglish_chapter_is_right():
    for lord, years in kp.DASHA_YEARS.items():
        assert re.search(rf"{lord} ki (dasha )?{years} saal", TEXT)
