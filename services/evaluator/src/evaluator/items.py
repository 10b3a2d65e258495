"""What each model did on each held-out question, as it is stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from evaluator.answers import Question, exact_answer
from evaluator.line import Measured
from parampara.schemas.comparison import Item, ItemAnswer


def make_items(questions: Sequence[Question], measured: dict[str, Measured]) -> list[Item]:
    """One item per question, in their order, with every model that was asked it."""
    return [
        Item(
            id=_id(question),
            question=question.text,
            kind=question.kind,
            language=question.language,
            expected=question.expected,
            models={name: _answer(question, model, index) for name, model in measured.items() if model.answers},
        )
        for index, question in enumerate(questions)
    ]


def as_lines(items: Sequence[Item]) -> str:
    return "".join(item.model_dump_json() + "\n" for item in items)


def _answer(question: Question, model: Measured, index: int) -> ItemAnswer:
    told, answer = model.answer_losses[index], model.answers[index]
    loss = told.mean if told is not None and math.isfinite(told.mean) else None
    return ItemAnswer(answer=answer, exact=exact_answer(answer, question.expected), loss=loss)


def _id(question: Question) -> str:
    asked = [message for message in question.conversation if message["role"] != "system"]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
