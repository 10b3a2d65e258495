"""Markers and attribution, text by text."""

from __future__ import annotations

import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from gateway.citations import _SENTENCE, MarkerFilter, attribute


def filtered(text: str, passages: int, *cuts: int) -> tuple[str, list[tuple[int, str]], str]:
    """The text that went out piece by piece, the marks as (number, marked text), and the whole text."""
    checked = MarkerFilter(passages)
    places = sorted({0, *(cut % (len(text) + 1) for cut in cuts), len(text)})
    out = "".join(checked.feed(text[start:end]) for start, end in itertools.pairwise(places)) + checked.finish()
    return out, [(mark.number, out[mark.start : mark.end]) for mark in checked.marks], checked.text


def test_known_markers_stay_and_unknown_ones_go() -> None:
    assert filtered("Ketu [1] and Venus [4].", 3) == ("Ketu [1] and Venus.", [(1, "[1]")], "Ketu [1] and Venus.")
    assert filtered("Both [1, 9,2] say so", 3)[:2] == ("Both [1, 2] say so", [(1, "[1, 2]"), (2, "[1, 2]")])
    assert filtered("No [0] none [99]", 3)[:2] == ("No none", [])


def test_a_list_of_every_passage_is_checked_number_by_number() -> None:
    every = ", ".join(map(str, range(1, 51)))
    out, marks, _ = filtered(f"All [{every}, 51, 52] of them", 50, *range(0, 220, 7))
    assert out == f"All [{every}] of them"
    assert [number for number, _ in marks] == list(range(1, 51))


def test_brackets_that_are_no_markers_stay() -> None:
    for text in ("a [list] of", "array[i]", "open [1", "open [", "[12345]", "[]", "1] [x1]"):
        assert filtered(text, 3) == (text, [], text)


_NUMBERS = st.lists(st.integers(0, 60), min_size=1, max_size=120)
_LISTS = st.builds(lambda gap, numbers: f" [{gap.join(map(str, numbers))}]", st.sampled_from([",", ", ", " , "]), _NUMBERS)
_TEXTS = st.lists(st.text(alphabet="ab [],123\n", max_size=60) | _LISTS, max_size=4).map("".join)


@given(_TEXTS, st.integers(0, 60), st.lists(st.integers(0, 1000), max_size=12))
def test_how_the_text_is_cut_into_pieces_changes_nothing(text: str, passages: int, cuts: list[int]) -> None:
    """Lists of any length included: what is held back while streaming is what counts as a marker in a whole answer."""
    whole, pieces = filtered(text, passages), filtered(text, passages, *cuts)
    assert whole == pieces
    assert pieces[0] == pieces[2]


def test_text_is_held_back_only_while_a_marker_may_be_under_way() -> None:
    checked = MarkerFilter(1)
    assert [checked.feed(piece) for piece in ["Ketu", " ", "[", "1", "]", " rules", " x[", "abc"]] == [
        *("Ketu", "", "", "", " [1]", " rules", " x", "[abc"),
    ]


PASSAGES = [
    "Ketu rules for seven years, Venus for twenty years in the Vimshottari cycle.",
    "The sub lord of the seventh cusp decides whether marriage is promised.",
    "Saptam bhav ka swami agar gyarah bhav ka karak ho to vivah hota hai.",
]


def attributed(text: str) -> list[tuple[str, int]]:
    return [(text[mark.start : mark.end], mark.number) for mark in attribute(text, PASSAGES)]


def test_each_line_goes_to_the_passage_that_says_it() -> None:
    text = "Answer: marriage is promised by the sub lord.\nRule: Ketu rules seven years.\nConfidence: High"
    assert attributed(text) == [("Answer: marriage is promised by the sub lord.", 2), ("Rule: Ketu rules seven years.", 1)]
    assert attributed("Saptam bhav ka swami karak ho.") == [("Saptam bhav ka swami karak ho.", 3)]


def test_a_word_is_read_together_with_the_question_that_it_answers() -> None:
    passages = ["Kaal ki ganana.", "Krittika, the third star, is ruled by the Sun.", "Hasta, the thirteenth star, is ruled by the Moon."]

    def cited(text: str, question: str) -> list[tuple[str, int]]:
        return [(text[mark.start : mark.end], mark.number) for mark in attribute(text, passages, question=question)]

    question = "By which planet is the star Krittika ruled?"
    assert cited("Answer: Sun\nConfidence: High", question) == [("Answer: Sun", 2)]
    assert cited("Answer: Sun", "By which planet is the star Hasta ruled?") == []  # what supports the opposite supports nothing
    assert cited("Answer: Rahu\nConfidence: High", question) == []
    assert cited("Sun", "Where shall we go tomorrow?") == []
    assert cited("Answer: Sun", "") == cited("...", question) == []


def test_what_no_passage_says_stays_without_a_citation() -> None:
    for text in ("", "Bananas grow in warm countries.", "Confidence: High", "...", "years"):
        assert attributed(text) == []


def test_a_long_run_of_marks_costs_no_more_than_its_length() -> None:
    """The text is whatever a model says, and all other requests of the process wait meanwhile."""

    def seconds(length: int) -> float:
        text = "Ketu" + "!?" * length + "rules"
        began = time.process_time()
        attribute(text, PASSAGES)
        return time.process_time() - began

    # with backtracking 30,000 of them take a minute, and ten times as many a hundred times as long
    assert seconds(30_000) < 5
    assert seconds(300_000) < 10


def test_sentences_end_at_marks_before_white_space_and_not_within_numbers() -> None:
    text = "It is 13.20 Leo. Is it? Haan।\nYes!! e.g.x ok"
    assert [match.group(0) for match in _SENTENCE.finditer(text)] == ["It is 13.20 Leo.", " Is it?", " Haan।", "Yes!!", " e.g.x ok"]


@given(st.text(max_size=200))
def test_attribution_takes_any_text(text: str) -> None:
    for mark in attribute(text, PASSAGES):
        assert 0 <= mark.start < mark.end <= len(text)
