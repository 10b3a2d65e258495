"""The measure of Hinglish on sentences whose language is known."""

from __future__ import annotations

import pytest

from evaluator.language import language_of, language_rate

ENGLISH = [
    "Answer: Ketu\nRule: The lord of the first star is Ketu.\nConfidence: High",
    "The main house is the tenth, so do not use the second one in this case.",
    "Rule: Leo holds 22 of 249 subs.",
]
HINGLISH = [
    "Answer: Ketu\nRule: Pehle nakshatra ka lord Ketu hota hai.\nConfidence: High",
    "Venus ki dasha bees saal tak chalti hai.",
    "Answer: 0°46'\nRule: 13°20' ka 7/120 hissa.\nConfidence: High",
    "10th cusp ka sub lord agar Saturn hai to job milega.",
]


@pytest.mark.parametrize("text", ENGLISH)
def test_english(text: str) -> None:
    assert language_of(text) == "english"


@pytest.mark.parametrize("text", HINGLISH)
def test_hinglish(text: str) -> None:
    assert language_of(text) == "hinglish"


def test_devanagari_is_not_hinglish() -> None:
    assert language_of("केतु की दशा सात साल") == "hindi"


@pytest.mark.parametrize("text", ["", "Ketu", "Answer: Ketu\nConfidence: High", "22"])
def test_a_short_answer_tells_nothing(text: str) -> None:
    assert language_of(text) == "unknown"


def test_rates_count_only_answers_that_can_tell() -> None:
    asked = ["hinglish", "hinglish", "hinglish", "english"]
    answers = [HINGLISH[0], ENGLISH[0], "Ketu", ENGLISH[1]]
    assert language_rate(asked, answers, "hinglish") == 0.5
    assert language_rate(asked, answers, "english") == 1.0
    assert language_rate(["english"], ["Ketu"], "english") is None
