"""Citations: which marker in an answer stands for which passage, and who said so.

A marker is trusted only when it names a passage that was laid before the model; any other is taken out of the text. Where a
model gives none, the gateway attributes line by line what the words themselves show, and says that it did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.search import Passage

_MOST = 256
"""Characters between the brackets; a list of all the passages that an answer can have is shorter."""
_MARKER = re.compile(rf"[ \t]?\[(?=[\d, \t]{{1,{_MOST}}}\])(\d{{1,4}}(?:[ \t]*,[ \t]*\d{{1,4}})*)\]")
# what may still become a marker: held back until the next piece of text decides
_OPEN = re.compile(rf"(?:[ \t]|[ \t]?\[[\d, \t]{{0,{_MOST}}})\Z")
# possessive: a run of marks is tried once and not at each of its places, which took seconds for a few thousand of them
_SENTENCE = re.compile(r"[^\n.!?।]+(?:[.!?।]++(?=[^\s.!?।])[^\n.!?।]+)*[.!?।]*")
_WORD = re.compile(r"\w+")
_MIN_COVERAGE = 0.5
_MIN_SHARED = 2
"""One word in common is chance."""
_LABEL = re.compile(r"\A\s*\w+:\s")
"""``Answer:``, ``Rule:``: the form of the answer, not what it says."""
_SAME_STEM = 5
_SHORT = 3


@dataclass(frozen=True)
class Mark:
    """``text[start:end]`` cites passage ``number`` (from 1)."""

    start: int
    end: int
    number: int
    attributed_by: str


class MarkerFilter:
    """Feeds an answer through piece by piece; ``text`` is what may go out, ``marks`` the citations in it."""

    def __init__(self, passages: int) -> None:
        self._passages = passages
        self._held = ""
        self.text = ""
        self.marks: list[Mark] = []

    def feed(self, piece: str) -> str:
        """Text that is certain now; empty while a marker may be under way."""
        pending = self._held + piece
        match = _OPEN.search(pending)
        cut = match.start() if match else len(pending)
        self._held = pending[cut:]
        return self._emit(pending[:cut])

    def finish(self) -> str:
        """What was still held back."""
        rest, self._held = self._held, ""
        return self._emit(rest)

    def _emit(self, text: str) -> str:
        out, last = "", 0
        for match in _MARKER.finditer(text):
            known = [number for number in map(int, match.group(1).split(",")) if 1 <= number <= self._passages]
            out += text[last : match.start()]
            last = match.end()
            if not known:
                continue
            lead = match.group(0)[: match.group(0).index("[")]
            start = len(self.text) + len(out) + len(lead)
            out += f"{lead}[{', '.join(map(str, known))}]"
            self.marks += [Mark(start, len(self.text) + len(out), number, "model") for number in known]
        out += text[last:]
        self.text += out
        return out


def attribute(text: str, passages: Sequence[str], *, question: str = "") -> list[Mark]:
    """Cite for each sentence or line the passage that holds most of its words, if it holds at least half of their weight.

    A word weighs more the fewer of the passages hold it, so words that all of them share decide nothing. Where that finds nothing,
    the first sentence is read as the answer to ``question``: ``Sun`` says too little by itself, ``who rules Krittika: Sun`` does not.
    """
    words = [_words(passage) for passage in passages]
    sentences = list(_SENTENCE.finditer(text))
    marks = []
    for match in sentences:
        best, coverage = _best(_words(_said(match)), words)
        if coverage >= _MIN_COVERAGE:
            marks.append(_mark(match, best))
    if not marks and question and sentences and (found := _answering(_said(sentences[0]), question, passages)) is not None:
        marks.append(_mark(sentences[0], found))
    return marks


def _said(sentence: re.Match[str]) -> str:
    return _LABEL.sub("", sentence.group(0), count=1)


def _mark(sentence: re.Match[str], passage: int) -> Mark:
    start = sentence.start() + len(sentence.group(0)) - len(sentence.group(0).lstrip())
    return Mark(start, start + len(sentence.group(0).strip()), passage + 1, "gateway")


def _answering(answer: str, question: str, passages: Sequence[str]) -> int | None:
    """The passage that holds every word of a short answer, however short the word, and what the question is about.

    That is half of the weight of those words of the question that any passage holds, the rarest of them included: a passage on
    another star may share all the rest.
    """
    own, words = set(_WORD.findall(answer.casefold())), [_words(passage) for passage in passages]
    weights = _weights(_words(question) & set().union(*words), words)
    most, total = max(weights.values(), default=0.0), sum(weights.values())
    telling = {word for word, weight in weights.items() if weight == most}
    for number, passage in enumerate(passages):
        shared = weights.keys() & words[number]
        if not own or not own <= set(_WORD.findall(passage.casefold())) or not telling <= shared or len(shared) < _MIN_SHARED:
            continue
        if sum(weights[word] for word in shared) >= _MIN_COVERAGE * total:
            return number
    return None


def _best(sentence: set[str], passages: list[set[str]]) -> tuple[int, float]:
    weights = _weights(sentence, passages)
    total = sum(weights.values())
    scores = [sum(weight for word, weight in weights.items() if word in passage) for passage in passages]
    if not total or not scores:
        return 0, 0.0
    best = max(range(len(scores)), key=scores.__getitem__)
    shared = sum(word in passages[best] for word in sentence)
    return best, scores[best] / total if shared >= _MIN_SHARED else 0.0


def _weights(words: set[str], passages: list[set[str]]) -> dict[str, float]:
    return {word: math.log(1 + len(passages) / (0.5 + sum(word in passage for passage in passages))) for word in words}


def _words(text: str) -> set[str]:
    """Content words, cut to their first letters so that ``rules`` and ``ruled``, ``swami`` and ``swaami`` come nearer."""
    return {word[:_SAME_STEM] for word in _WORD.findall(text.casefold()) if len(word) > _SHORT or word.isdigit()}


def url_citations(marks: Sequence[Mark], passages: Sequence[Passage], *, base_url: str) -> list[dict[str, Any]]:
    """``message.annotations``: the one form that the typed SDK accepts in chat."""
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "start_index": mark.start,
                "end_index": mark.end,
                "url": _url(passages[mark.number - 1], base_url),
                "title": _title(passages[mark.number - 1]),
            },
            "attributed_by": mark.attributed_by,
        }
        for mark in marks
    ]


def context(marks: Sequence[Mark], passages: Sequence[Passage], *, base_url: str, query: str, dropped: int) -> dict[str, Any]:
    """``message.context``: every passage the model saw, in marker order, with its score and whether the answer cites it."""
    by_number: dict[int, str] = {mark.number: mark.attributed_by for mark in marks}
    return {
        "query": query,
        "dropped": dropped,
        "citations": [
            {
                "index": number,
                "marker": f"[{number}]",
                "title": _title(passage),
                "cited": number in by_number,
                "attributed_by": by_number.get(number),
                "file_id": passage.file_id,
                "filename": passage.filename,
                "vector_store_id": passage.vector_store_id,
                "chunk_id": passage.chunk_id,
                "position": passage.position,
                "page": passage.page,
                "score": passage.score,
                "text": passage.text,
                "url": _url(passage, base_url),
            }
            for number, passage in enumerate(passages, 1)
        ],
    }


def _url(passage: Passage, base_url: str) -> str:
    return f"{base_url}/v1/files/{passage.file_id}/content"


def _title(passage: Passage) -> str:
    return f"{passage.filename}, page {passage.page}" if passage.page else passage.filename
