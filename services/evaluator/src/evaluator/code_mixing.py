"""How mixed is Hinglish? Two measures of code-mixed text, and of how far a model's answers are from the data's own.

- Code-Mixing Index (Das and Gambäck 2014, "Identifying Languages at the Word Level in Code-Mixed Indian Social Media Text"):
  CMI = 1 - max_i(w_i) / (n - u), where w_i are the words of language i, n all words and u those that belong to no language.
  0 is one language alone, 0.5 half and half; here a fraction, there per cent.
- Switch rate (the I-index of Guzmán et al. 2017, "Metrics for modeling code-switching across corpora"): how often the language
  changes from one word to the next. "job milega tenth cusp se" and "milega se job tenth cusp" have one CMI and two switch rates.

Which language a word is from comes from the run's own training rows: a romanised Hindi function word
(:mod:`evaluator.language`) is Hindi; a word is English that English rows use at least a tenth as often as Hinglish rows do;
other words of Hinglish rows are Hindi. So a loan word of the domain ("dasha" in English rows) counts as English, a name that both
use as well. A word that neither uses belongs to no language.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from evaluator.language import FUNCTION_WORDS, MIN_WORDS, words_of

Tongue = Literal["english", "hindi"]
_MUCH_OFTENER = 10
"""Times as often in Hinglish as in English rows, from which on a word of both ("to", "main", "hi") is Hindi."""


@dataclass(frozen=True)
class Lexicon:
    english: frozenset[str]
    hindi: frozenset[str]

    def tongues(self, text: str) -> list[Tongue]:
        """The language of each word that has one, in order."""
        return ["hindi" if word in self.hindi else "english" for word in words_of(text) if word in self.hindi or word in self.english]


@dataclass(frozen=True)
class Mixing:
    """Means over texts."""

    cmi: float
    switches: float


def learn(english: Iterable[str], hinglish: Iterable[str]) -> Lexicon | None:
    """The words of both languages from texts that are known to be English and Hinglish; None if either is missing."""
    pure, mixed = (Counter(word for text in texts for word in words_of(text)) for texts in (english, hinglish))
    if not pure or not mixed:
        return None
    scale = pure.total() / mixed.total()
    hindi = {word for word, count in mixed.items() if count * scale > _MUCH_OFTENER * pure[word]}  # pure[word] is 0 for most
    hindi |= FUNCTION_WORDS
    return Lexicon(english=frozenset(pure.keys() - hindi), hindi=frozenset(hindi))


def cmi(tongues: Sequence[Tongue]) -> float:
    """1 - max(w_i) / (n - u); 0 where no word belongs to a language."""
    return 1 - max(Counter(tongues).values()) / len(tongues) if tongues else 0.0


def switches(tongues: Sequence[Tongue]) -> float:
    """Share of neighbouring words of which the languages differ; 0 for fewer than two words."""
    pairs = list(pairwise(tongues))
    return sum(before != after for before, after in pairs) / len(pairs) if pairs else 0.0


def mixing(lexicon: Lexicon, texts: Sequence[str]) -> Mixing | None:
    """Means over the texts with enough words to tell; None if there is none."""
    told = [tongues for text in texts if len(tongues := lexicon.tongues(text)) >= MIN_WORDS]
    if not told:
        return None
    return Mixing(cmi=sum(map(cmi, told)) / len(told), switches=sum(map(switches, told)) / len(told))


def metrics(lexicon: Lexicon, *, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Both measures of answers to Hinglish questions, of the reference answers, and how far they lie apart."""
    own, reference = mixing(lexicon, answers), mixing(lexicon, references)
    told: dict[str, float] = {}
    for measure in ("cmi", "switches"):
        sides = {"answers": own, "reference": reference}
        told |= {f"language.{measure}.{side}": getattr(of, measure) for side, of in sides.items() if of is not None}
        if own is not None and reference is not None:
            told[f"language.{measure}.difference"] = abs(getattr(own, measure) - getattr(reference, measure))
    return told
