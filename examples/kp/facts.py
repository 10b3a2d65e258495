"""What a fact of KP is, how its kind asks for it, and the form of an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

Language = Literal["english", "hinglish"]


@dataclass(frozen=True)
class Fact:
    """One fact: the words that fill the phrasings, the answer and the rule in both languages, and its sentence in the books."""

    kind: str
    words: dict[str, str]
    answer: dict[Language, str]
    rule: dict[Language, str]
    confidence: Literal["High", "Medium", "Low"] = "High"
    evidence: str | None = None
    """A piece of a sentence that stands in the books and states the fact."""
    hinglish_words: dict[str, str] = field(default_factory=dict)
    """Words that a Hinglish question has in place of those in ``words``."""


@dataclass(frozen=True)
class Kind:
    topic: str
    facts: Callable[[], Iterator[Fact]]
    english: list[str]
    hinglish: list[str]


def question_text(fact: Fact, language: Language, phrasing: str) -> str:
    """The phrasing with the words of the fact in it."""
    words = fact.words if language == "english" else {**fact.words, **fact.hinglish_words}
    text = phrasing.format(**words)
    return text[0].upper() + text[1:]


def answer_text(fact: Fact, language: Language, *, marker: str = "") -> str:
    """The three lines; ``marker``, such as ``[1]``, names the passage that holds the rule and stands at the end of its line."""
    rule = fact.rule[language] + (f" {marker}" if marker else "")
    return f"Answer: {fact.answer[language]}\nRule: {rule}\nConfidence: {fact.confidence}"


def same_answer(kind: str, words: dict[str, str], answer: str, english: str, hinglish: str, **more: Any) -> Fact:
    """A fact whose answer is the same words in both languages; ``english`` and ``hinglish`` are its rule."""
    return Fact(kind, words, {"english": answer, "hinglish": answer}, {"english": english, "hinglish": hinglish}, **more)
