"""Rows of questions and answers: the loss counts answers only, and what is trained is what will be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parampara.datasets import Message, QaRow, read_qa
from parampara.errors import InvalidData
from parampara.progress import SilentProgress
from parampara.schemas.stages import QaData
from tests.tiny_models import make_model
from tests.trainer.runs import sft_config
from trainer import sft
from trainer.chat import build_rows, tokenize_row
from trainer.engine import load_tokenizer
from trainer.rows import IGNORED, TokenRow


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return load_tokenizer(base)


def learnt(row: TokenRow) -> list[int]:
    return [label for label in row.labels if label != IGNORED]


def test_every_row_trains_its_answer_and_nothing_else(base: Path, qa: Path, tokenizer: Any) -> None:
    data = build_rows(sft_config(base, qa, max_seq_length=512, system_prompt="Be exact."), tokenizer)
    answers = {row.answer for row in read_qa(qa)}
    assert len(data.train) + len(data.validation) == 40
    for row in data.train + data.validation:
        text = tokenizer.decode(learnt(row))
        assert text.removesuffix("<|eot_id|>") in answers
        assert text.endswith("<|eot_id|>")
        assert tokenizer.decode(row.input_ids).startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe exact.")


def test_the_prompt_is_tokenized_as_the_server_will(base: Path, qa: Path, tokenizer: Any) -> None:
    row = read_qa(qa)[0]
    tokens = tokenize_row(row, tokenizer, system_prompt=None, max_length=512)
    served = tokenizer.apply_chat_template([{"role": "user", "content": row.question}], add_generation_prompt=True)["input_ids"]
    assert tokens.input_ids[: len(served)] == served
    assert tokens.labels[: len(served)] == [IGNORED] * len(served)
    assert IGNORED not in tokens.labels[len(served) :]


def test_every_answer_of_a_conversation_is_learnt(tokenizer: Any) -> None:
    turns = [
        Message("system", "S"),
        Message("user", "one?"),
        Message("assistant", "uno"),
        Message("user", "two?"),
        Message("assistant", "dos"),
    ]
    row = tokenize_row(QaRow(turns), tokenizer, system_prompt="not used, the row has its own", max_length=512)
    assert tokenizer.decode(learnt(row)) == "uno<|eot_id|>dos<|eot_id|>"
    assert "not used" not in tokenizer.decode(row.input_ids)


def test_a_row_that_would_train_nothing_is_an_error(base: Path, qa: Path, tokenizer: Any) -> None:
    row = QaRow([Message("user", "why " * 100), Message("assistant", "Because.")])
    with pytest.raises(InvalidData, match="train nothing"):
        tokenize_row(row, tokenizer, system_prompt=None, max_length=64)
    with pytest.raises(InvalidData, match=r"qa\.jsonl row \d+: .* train nothing"):
        build_rows(sft_config(base, qa, max_seq_length=16), tokenizer)


def test_rows_cut_inside_the_answer_are_counted(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "' + "long " * 200 + '"}\n')
    data = build_rows(sft_config(base, path, max_seq_length=64), tokenizer)
    assert data.facts["truncated_rows"] == 1
    assert max(len(row.input_ids) for row in data.train + data.validation) == 64


def test_held_out_rows_never_appear_in_training(base: Path, tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(f'{{"question": "q {i % 10}", "answer": "a {i % 10}"}}\n' for i in range(40)))
    data = build_rows(sft_config(base, path), tokenizer)
    assert data.facts["duplicate_rows"] == 30
    assert not {tuple(row.input_ids) for row in data.train} & {tuple(row.input_ids) for row in data.validation}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}", "generation prompt"),
    ],
)
def test_a_base_without_a_usable_template_is_refused(tmp_path: Path, qa: Path, template: str | None, message: str) -> None:
    base = make_model(tmp_path / "base", chat_template=template)
    with pytest.raises(InvalidData, match=message):
        sft.run(sft_config(base, qa), workdir=tmp_path / "work", progress=SilentProgress())
    assert not (tmp_path / "work" / "output").exists()


def test_one_row_is_too_few(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(InvalidData, match="at least 2 distinct rows"):
        sft.run(sft_config(base, path), workdir=tmp_path / "work", progress=SilentProgress())


def write_questions(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows), encoding="utf-8")
    return path


def test_a_question_with_two_answers_is_not_split(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The same question in training and validation would measure memory."""
    path = write_questions(tmp_path / "two.jsonl", [(f"Who rules star {n // 2}?", f"Answer: {n}") for n in range(60)])
    data = build_rows(sft_config(base, path), tokenizer)
    train, held = ({tuple(row.input_ids[: row.labels.count(IGNORED)]) for row in side} for side in (data.train, data.validation))
    assert (len(train), len(held)) == (27, 3)
    assert not train & held
    assert data.facts["asked_in_both"] == 0


def test_questions_that_are_trained_on_and_validated_with_are_told(base: Path, tmp_path: Path) -> None:
    train = write_questions(tmp_path / "train.jsonl", [("Who rules Ashwini?", "Ketu"), ("Who rules Bharani?", "Venus")])
    held = write_questions(tmp_path / "held.jsonl", [("who rules  Ashwini?", "Answer: Ketu"), ("Who rules Rohini?", "Moon")])
    config = sft_config(base, train, max_steps=1)
    config = config.model_copy(update={"data": QaData(train=[train], validation=[held])})

    class Warned(SilentProgress):
        events: list[str] = []

        def event(self, message: str, **data: Any) -> None:
            self.events.append(message)

    progress = Warned()
    sft.run(config, workdir=tmp_path / "work", progress=progress)
    assert [event for event in progress.events if event.startswith("1 of 2 validation rows")]
