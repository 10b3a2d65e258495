"""Which language an answer is in: English, Hinglish (Hindi in Latin letters, mixed with English terms), Hindi, or unknown.

The measure. Code-mixed text keeps the *function words* of its matrix language (Myers-Scotton 1993, matrix language frame) and
borrows content words freely: in "Venus ka dasha 20 saal ka hota hai" only ``ka``, ``hota`` and ``hai`` tell. So the share of
words that are romanised Hindi function words, in the usual spellings, decides. Words that are also English ("me", "is",
"to", "the", "main", "hi", "do", "par", "us", "in") are not in the list. Labels of lines ("Answer:", "Rule:") and numbers are
not counted as words. An answer too short to hold a function word ("Ketu") is ``unknown`` and counts for neither side of a rate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

Language = Literal["english", "hinglish", "hindi", "unknown"]

HINGLISH_SHARE = 0.1
"""From this share of Hindi function words on, a text is Hinglish. English text measures 0; Hinglish sentences 0.2 to 0.6."""
MIN_WORDS = 3

_LABEL = re.compile(r"^\s*[A-Za-z][A-Za-z ]{0,20}:", re.MULTILINE)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_DEVANAGARI = re.compile("[\u0900-\u097f]")
_HINDI = """
aa aap aapka aapke aapki aata aati aate ab abhi agar apna apne apni aur bahut baad bhi bina bolte chahiye chuka chuki
diya diye dega degi deta dete deti dekho dekhte dekhna dono gaya gayi gaye hai hain hoga hogi honge hona hone hota hote
hoti hua hue hui hum humko inka inke inki isi iska iske iski isko isliye ismein isme isse jab jahan jaisa jaise jata jate
jati jaye jiska jiske jiski jisko jismein jo ka kab kabhi kahan kaise kaun kaunsa kaunse kaunsi kar karein karke karna
karne karo karta karte karti ke ki kis kisi kiska kiske kiski kisko kitna kitne kitni ko koi kuch kya kyon kyun kyunki
lekin liye magar matlab mein mere meri milega milegi milta milte milti mujhe nahi nahin ne neeche niche pehla pehle pehli
phir poora puchha raha rahe rahi sab saath saal se ek sakta sakte sakti saare sirf tab tak tatha teen toh tum tumhara tumko unka
unke unki unko upar usi uska uske uski usko usmein usme usse wahan waala waale waali wala wale wali wo woh ya yaani yadi
yahan yahi ye yeh
"""
FUNCTION_WORDS = frozenset(_HINDI.split())


def language_of(text: str) -> Language:
    """Language of a text by the measure of this module."""
    if _DEVANAGARI.search(text):
        return "hindi"
    words = words_of(text)
    if len(words) < MIN_WORDS:
        return "unknown"
    return "hinglish" if function_word_share(words) >= HINGLISH_SHARE else "english"


def words_of(text: str) -> list[str]:
    """Its words in lower case, without numbers and the labels of lines."""
    return _WORD.findall(_LABEL.sub(" ", text).casefold())


def function_word_share(words: Sequence[str]) -> float:
    """Share of lower-case words that are romanised Hindi function words."""
    return sum(word in FUNCTION_WORDS for word in words) / len(words)


def language_rate(asked: Sequence[str], answers: Sequence[str], language: Language) -> float | None:
    """Of the questions asked in ``language`` whose answer is long enough to tell: the share answered in it. None if there are none."""
    told = [language_of(answer) for question, answer in zip(asked, answers, strict=True) if question == language]
    known = [found for found in told if found != "unknown"]
    return sum(found == language for found in known) / len(known) if known else None
