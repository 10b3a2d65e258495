"""Held-out data: validation files as given, or exactly what the training stages hold out."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluator.heldout import read_held_out
from evaluator.models import load_tokenizer
from parampara.datasets import hold_out, read_qa
from parampara.errors import InvalidData
from parampara.schemas.stages import EvaluateParams, QaData, SftParams, TextData
from tests.evaluator.lines import Line, rows, write_rows


def test_without_validation_files_the_split_of_training_is_used(line: Line) -> None:
    path = line.root / "qa.jsonl"
    params = SftParams(validation_fraction=0.4)
    held = read_held_out(line.config(qa=QaData(train=[path]), sft_params=params), load_tokenizer(line.root / "base"))
    trained, kept = hold_out(read_qa(path), fraction=0.4, seed=42, content=lambda row: row.asked)
    assert {question.text for question in held.questions} == {row.question for row in kept}
    assert not {question.text for question in held.questions} & {row.question for row in trained}
    assert held.texts
    book = (line.root / "book.txt").read_text()
    assert all(text[:20] in book for text in held.texts)


def test_validation_files_are_used_whole(line: Line, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("A held-out page about the Moon.")
    text = TextData(train=[line.root / "book.txt"], validation=[tmp_path / "held.txt"])
    config = line.config(text=text, params=EvaluateParams(max_questions=100))
    held = read_held_out(config, load_tokenizer(line.root / "base"))
    assert held.texts == ["A held-out page about the Moon."]
    assert len(held.questions) == len(rows())


def test_the_limits_choose_the_same_items_whatever_their_order(line: Line, tmp_path: Path) -> None:
    write_rows(tmp_path / "reversed.jsonl", rows()[::-1])
    tokenizer = load_tokenizer(line.root / "base")
    params = EvaluateParams(max_questions=4, parity_prompts=2, max_chunks=2)
    first = read_held_out(line.config(params=params), tokenizer)
    reversed_qa = QaData(train=[tmp_path / "reversed.jsonl"], validation=[tmp_path / "reversed.jsonl"])
    second = read_held_out(line.config(params=params, qa=reversed_qa), tokenizer)
    assert first.questions == second.questions
    assert (len(first.questions), len(first.probes), len(first.texts)) == (4, 2, 2)


def test_a_question_knows_what_is_expected_and_its_system_prompt(line: Line, tmp_path: Path) -> None:
    write_rows(tmp_path / "plain.jsonl", [{"question": "Who?", "answer": "Answer: Ketu\nRule: r"}, {"question": "B?", "answer": "b"}])
    qa = QaData(train=[tmp_path / "plain.jsonl"], validation=[tmp_path / "plain.jsonl"])
    config = line.config(qa=qa, sft_params=SftParams(system_prompt="Be exact."))
    questions = {question.text: question for question in read_held_out(config, load_tokenizer(line.root / "base")).questions}
    assert (questions["Who?"].expected, questions["B?"].expected) == ("Ketu", "b")
    assert questions["Who?"].prompt[0] == {"role": "system", "content": "Be exact."}


def test_a_missing_file_is_named(line: Line, tmp_path: Path) -> None:
    qa = QaData(train=[tmp_path / "gone.jsonl"])
    with pytest.raises(InvalidData, match=r"gone\.jsonl"):
        read_held_out(line.config(qa=qa), load_tokenizer(line.root / "base"))


def test_a_question_with_two_answers_is_not_split(line: Line, tmp_path: Path) -> None:
    """The same question in training and held out would measure memory."""
    write_rows(tmp_path / "two.jsonl", [{"question": f"Who rules star {n // 2}?", "answer": f"Answer: {n}"} for n in range(60)])
    params, qa = SftParams(validation_fraction=0.3), QaData(train=[tmp_path / "two.jsonl"])
    config = line.config(qa=qa, sft_params=params, params=EvaluateParams(max_questions=100))
    held = read_held_out(config, load_tokenizer(line.root / "base"))
    assert len(held.questions) == 18
    assert len({question.text for question in held.questions}) == 9


def test_held_out_questions_that_training_asks_too_are_counted(line: Line, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"question": "Who rules Ashwini?", "answer": "Ketu"}, {"question": "Why?", "answer": "So."}])
    write_rows(tmp_path / "held.jsonl", [{"question": "who rules  Ashwini?", "answer": "Moon"}, {"question": "How?", "answer": "So."}])
    qa = QaData(train=[tmp_path / "train.jsonl"], validation=[tmp_path / "held.jsonl"])
    assert read_held_out(line.config(qa=qa), load_tokenizer(line.root / "base")).trained_on == 1


def test_the_language_of_a_row_without_a_label_is_told_from_its_question(line: Line, tmp_path: Path) -> None:
    asked = ["Ketu ki dasha kitne saal ki hoti hai?", "How many years does the dasha of Ketu have?", "Ketu?"]
    write_rows(tmp_path / "plain.jsonl", [{"question": text, "answer": "7"} for text in asked])
    qa = QaData(train=[tmp_path / "plain.jsonl"], validation=[tmp_path / "plain.jsonl"])
    held = read_held_out(line.config(qa=qa), load_tokenizer(line.root / "base"))
    assert {question.text: question.language for question in held.questions} == dict(zip(asked, ["hinglish", "english", ""], strict=True))
