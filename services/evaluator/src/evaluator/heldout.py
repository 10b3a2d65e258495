"""What training never saw: the held-out texts and questions of a line, chosen the same way every time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from evaluator.answers import Question, answer_part
from evaluator.language import language_of
from evaluator.models import Conversation
from parampara.datasets import QaRow, chunk_documents, content_hash, count_asked_in_both, hold_out, read_book, read_qa
from parampara.schemas.stages import EvaluateConfig

Item = TypeVar("Item")


@dataclass(frozen=True)
class HeldOut:
    texts: list[str]
    questions: list[Question]
    probes: list[Conversation]
    """Conversations for the parity ledger: the first of ``questions``, answers included."""
    trained_on: int = 0
    """How many of ``questions`` are asked in the training files too: their exact rate tells of memory."""


def read_held_out(config: EvaluateConfig, tokenizer: Any) -> HeldOut:
    """Read the validation files, or the part of the training files that the split of the training stages holds out.

    At most ``params.max_chunks`` texts, ``params.max_questions`` questions and ``params.parity_prompts`` probes: those whose
    content hashes come first under the seed, so a file's order does not matter and a rerun measures the same items.

    Raises:
        InvalidData: a file is missing or not what it has to be, or nothing is held out.
    """
    texts = _first(_texts(config, tokenizer), content=str, limit=config.params.max_chunks, seed=config.seed)
    rows = _first(_rows(config), content=lambda row: row.text, limit=config.params.max_questions, seed=config.seed)
    questions = [_question(row, config.sft_params.system_prompt) for row in rows]
    return HeldOut(
        texts=texts,
        questions=questions,
        probes=[question.conversation for question in questions[: config.params.parity_prompts]],
        trained_on=_trained_on(config, rows),
    )


def _texts(config: EvaluateConfig, tokenizer: Any) -> list[str]:
    documents = [read_book(path) for path in config.text.validation or config.text.train]
    chunks = chunk_documents(
        documents,
        max_tokens=config.dapt_params.chunk_tokens,
        count_tokens=lambda text: len(tokenizer(text, add_special_tokens=False).input_ids),
    )
    if config.text.validation:
        return [chunk.text for chunk in chunks]
    fraction = config.dapt_params.validation_fraction
    _, held_out = hold_out(chunks, fraction=fraction, seed=config.seed, content=lambda chunk: chunk.text, what="chunks")
    return [chunk.text for chunk in held_out]


def _rows(config: EvaluateConfig) -> list[QaRow]:
    rows = [row for path in config.qa.validation or config.qa.train for row in read_qa(path)]
    if config.qa.validation:
        return rows
    _, held_out = hold_out(rows, fraction=config.sft_params.validation_fraction, seed=config.seed, content=lambda row: row.asked)
    return held_out


def _trained_on(config: EvaluateConfig, rows: Sequence[QaRow]) -> int:
    """How many of the held-out rows ask what a training row asks too; none where the split of training held them out."""
    if not config.qa.validation:
        return 0
    return count_asked_in_both([row for path in config.qa.train for row in read_qa(path)], rows)


def _question(row: QaRow, system_prompt: str | None) -> Question:
    messages = [{"role": message.role, "content": message.content} for message in row.messages]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    expected = row.metadata.get("expected")
    return Question(
        prompt=messages[:-1],
        reference=row.answer,
        expected=expected if isinstance(expected, str) and expected.strip() else answer_part(row.answer),
        kind=_label(row.metadata.get("kind")),
        language=_language(row),
    )


def _language(row: QaRow) -> str:
    """As the row is labelled, else by :func:`language_of`; empty where neither tells."""
    told = _label(row.metadata.get("language")) or language_of(row.question)
    return "" if told == "unknown" else told


def _label(value: Any) -> str:
    return value.strip().casefold() if isinstance(value, str) else ""


def _first(items: Sequence[Item], *, content: Callable[[Item], str], limit: int, seed: int) -> list[Item]:
    """The distinct items whose seeded content hashes come first."""
    by_hash = {content_hash(content(item)): item for item in items}
    order = sorted(by_hash, key=lambda digest: hashlib.sha256(f"evaluate:{seed}:{digest}".encode()).digest())
    return [by_hash[digest] for digest in order[:limit]]
