"""What training never saw: the held-out texts and questions of a line, chosen the same way every time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evaluator.answers import Question, answer_part
from evaluator.code_mixing import Lexicon, learn
from evaluator.language import language_of
from evaluator.models import Conversation
from parampara.datasets import QaRow, count_asked_in_both, read_qa
from parampara.datasets.chat import conversation_of, token_ids
from parampara.datasets.held_out import held_out_rows, held_out_texts, trained_pairs
from parampara.datasets.rows import Row
from parampara.schemas.stages import EvaluateConfig


@dataclass(frozen=True)
class HeldOut:
    texts: list[str]
    questions: list[Question]
    probes: list[Conversation]
    """Conversations for the parity ledger: the first of ``questions``, answers included."""
    trained_on: int = 0
    """How many of ``questions`` are asked in the training files or the preferences too: their exact rate tells of memory."""
    lexicon: Lexicon | None = None
    """English and Hindi words of the training files; None where they hold one language only."""


def read_held_out(config: EvaluateConfig, tokenizer: Any) -> HeldOut:
    """Read the validation files, or the part of the training files that the split of the training stages holds out.

    At most ``params.max_chunks`` texts, ``params.max_questions`` questions and ``params.parity_prompts`` probes: those whose
    content hashes come first under the seed, so a file's order does not matter and a rerun measures the same items.

    Raises:
        InvalidData: a file is missing or not what it has to be, or nothing is held out.
    """
    limits, seed = config.params, config.seed
    texts = held_out_texts(
        config.text, config.dapt_params, limit=limits.max_chunks, seed=seed, count_tokens=lambda text: len(token_ids(tokenizer, text))
    )
    rows = held_out_rows(config.qa, config.sft_params, limit=limits.max_questions, seed=seed)
    questions = [_question(row, config.sft_params.system_prompt) for row in rows]
    return HeldOut(
        texts=texts,
        questions=questions,
        probes=[question.conversation for question in questions[: limits.parity_prompts]],
        trained_on=_trained_on(config, rows),
        lexicon=_lexicon(config),
    )


def _trained_on(config: EvaluateConfig, rows: Sequence[QaRow]) -> int:
    """How many of the held-out rows ask what a training row or a pair that DPO trained on asks too.

    The split of SFT held them out of its own files; it knows nothing of the preferences.
    """
    trained: list[Row] = [row for path in config.qa.train for row in read_qa(path)] if config.qa.validation else []
    if config.preferences is not None:
        trained += trained_pairs(config.preferences, config.dpo_params, seed=config.seed)
    return count_asked_in_both(trained, rows)


def _lexicon(config: EvaluateConfig) -> Lexicon | None:
    texts: dict[str, list[str]] = {"english": [], "hinglish": []}
    for path in config.qa.train:
        for row in read_qa(path):
            texts.get(_language(row), []).extend((row.question, row.answer))
    return learn(texts["english"], texts["hinglish"])


def _question(row: QaRow, system_prompt: str | None) -> Question:
    expected = row.metadata.get("expected")
    return Question(
        prompt=conversation_of(row, system_prompt=system_prompt)[:-1],
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
