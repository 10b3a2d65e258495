"""Write the question-and-answer set of this example: ``python examples/kp/generate.py --out DIR``.

Makes ``train.jsonl`` and ``heldout.jsonl`` in the form that the platform takes (``{"messages": [...], "metadata": {...}}``),
the same bytes on every machine. Of each fact one way of asking is held out: a held-out question is a new pairing of a fact
and a phrasing that training has both seen, but never together. About a ninth of the rows are open-book: passages of the
books stand in the system message in the platform's own retrieval form, and the rule cites the passage that holds it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from facts import Fact, Kind, Language, answer_text, question_text
from questions import FEW_FACTS, KINDS, LEAD_INS

from parampara.rag import context_message

Row = dict[str, Any]

HERE = Path(__file__).parent
QUESTIONS_SEED = 20260101
OPEN_BOOK_SHARE = 0.25
MANY_SHARE = 0.2
"""Share of the open-book rows that carry as many passages as retrieval lays before a model of a thousand tokens."""
WINDOW_WORDS = (25, 40, 60, 120)
"""Lengths of quoted passages, in words; the long one is drawn rarely."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=QUESTIONS_SEED, help="order of the rows and choice of passages")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in split_rows(arguments.seed).items():
        path = arguments.out / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


def split_rows(seed: int) -> dict[str, list[Row]]:
    """Rows for ``train`` and ``heldout``, each shuffled."""
    rng = random.Random(seed)
    library = Library(HERE / "books")
    rows: dict[str, list[Row]] = {"train": [], "heldout": []}
    for name, kind in KINDS.items():
        facts = list(kind.facts())
        phrasings = _phrasings(kind)
        for number, fact in enumerate(facts):
            kept_back = (number + number // len(phrasings)) % len(phrasings)
            for index, (language, phrasing) in enumerate(phrasings):
                part = "heldout" if index == kept_back else "train"
                question = question_text(fact, language, phrasing)
                if name != "not_covered":
                    rows[part].append(_row(kind, fact, language, question))
                    if part == "train" and len(facts) < FEW_FACTS:
                        rows[part] += [_row(kind, fact, language, opening + question) for opening in LEAD_INS[language]]
                if name == "not_covered" or (fact.evidence and rng.random() < OPEN_BOOK_SHARE):
                    rows[part].append(_open_book_row(kind, fact, language, question, library=library, rng=rng))
    for part in rows.values():
        rng.shuffle(part)
    return rows


def all_rows(seed: int) -> list[Row]:
    """Both splits together."""
    return [row for rows in split_rows(seed).values() for row in rows]


class Library:
    """The books, cut at paragraphs and sentences, for quoting."""

    def __init__(self, folder: Path) -> None:
        paragraphs = [text for book in sorted(folder.glob("*.txt")) for text in book.read_text(encoding="utf-8").split("\n\n")]
        self.paragraphs = [sentences(text) for text in paragraphs if len(text.split()) > 12]

    def quote(self, evidence: str, *, words: int) -> str:
        """About ``words`` words of whole sentences round the one that holds ``evidence``.

        Raises:
            LookupError: no book states it.
        """
        for parts in self.paragraphs:
            for index in range(len(parts)):
                if evidence in " ".join(parts[index : index + 2]):
                    last = index if evidence in parts[index] else index + 1
                    return _grow(parts, index, last, words=words)
        raise LookupError(f"No book states: {evidence}")

    def other(self, evidence: str | None, *, words: int, rng: random.Random) -> str:
        """A passage that does not hold ``evidence``."""
        while True:
            parts = rng.choice(self.paragraphs)
            start = rng.randrange(len(parts))
            passage = _grow(parts, start, start, words=words)
            if not evidence or evidence not in passage:
                return passage


def sentences(paragraph: str) -> list[str]:
    """Sentences of a paragraph; the number of a numbered entry stays with its title."""
    return [part for part in re.split(r"(?<=[a-z0-9)'\"][.?!]) (?=[A-Z])", " ".join(paragraph.split())) if part]


def _grow(parts: list[str], first: int, last: int, *, words: int) -> str:
    """Sentences ``first`` to ``last``, with those after and before them as long as ``words`` allows."""
    while True:
        longer = [(first, last + 1)] * (last + 1 < len(parts)) + [(first - 1, last)] * (first > 0)
        fitting = [(a, b) for a, b in longer if len(" ".join(parts[a : b + 1]).split()) <= words]
        if not fitting:
            return " ".join(parts[first : last + 1])
        first, last = fitting[0]


def _phrasings(kind: Kind) -> list[tuple[Language, str]]:
    english: list[tuple[Language, str]] = [("english", text) for text in kind.english]
    return english + [("hinglish", text) for text in kind.hinglish]


def _row(kind: Kind, fact: Fact, language: Language, question: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer_text(fact, language)}]
    return {"messages": turns, "metadata": _metadata(kind, fact, language)}


def _open_book_row(kind: Kind, fact: Fact, language: Language, question: str, *, library: Library, rng: random.Random) -> Row:
    many = rng.random() < MANY_SHARE
    count = rng.randint(4, 7) if many else rng.choice([0, 1, 1, 2])
    passages = [
        library.other(fact.evidence, words=WINDOW_WORDS[2] if many else rng.choice(WINDOW_WORDS[:3]), rng=rng) for _ in range(count)
    ]
    marker = ""
    if fact.evidence:
        place = rng.choice([0, 0, 0, min(1, count), count])
        passages.insert(place, library.quote(fact.evidence, words=rng.choices(WINDOW_WORDS, weights=[4, 3, 2, 1])[0]))
        marker = f"[{place + 1}]"
    elif not passages:
        passages = [library.other(None, words=40, rng=rng)]
    turns = [
        {"role": "system", "content": context_message(passages)},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer_text(fact, language, marker=marker)},
    ]
    return {"messages": turns, "metadata": {**_metadata(kind, fact, language), "open_book": True}}


def _metadata(kind: Kind, fact: Fact, language: Language) -> Row:
    return {"kind": fact.kind, "language": language, "expected": fact.answer[language], "topic": kind.topic}


def questions(rows: list[Row]) -> Iterator[str]:
    """The user's turn of each row."""
    for row in rows:
        yield next(turn["content"] for turn in row["messages"] if turn["role"] == "user")


if __name__ == "__main__":
    main()
