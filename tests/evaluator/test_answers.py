"""Exact answers, format rates and greedy generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from evaluator.answers import Question, answer_part, exact_answer, exact_rates, format_rates, generate_ids, normalise
from evaluator.meter import Meter
from evaluator.models import loaded, prompt_ids
from parampara.errors import InvalidRequest, Preempted
from parampara.execution import stop
from parampara.progress import SilentProgress
from tests.evaluator.lines import FORMATS, Line


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The  Sun. ", "the sun"),
        ("SUN", "sun"),
        ("Sun, Moon", "sun moon"),
        ("13°20'", "13 degrees 20 minutes"),
        ("2°13′20″", "2 degrees 13 minutes 20 seconds"),
        ("Venus's", "venus s"),
        ("“5”", "5"),
        ("2,7, 11", "2 7 11"),
        ("1.5.", "1.5"),
        ("−5 %", "minus 5 percent"),
        ("\uff33un", "sun"),
        ("sub_lord", "sub lord"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


@pytest.mark.parametrize(("said", "meant"), [("13'20", "13°20'"), ("-5", "5"), ("1.5", "1 5"), ("15", "1.5"), ("5", "5 %"), ("5'", '5 "')])
def test_numbers_of_another_unit_or_sign_are_other_answers(said: str, meant: str) -> None:
    assert not exact_answer(said, meant)


@pytest.mark.parametrize(("said", "meant"), [("2°13' 20''", "2°13'20\""), ("2 degrees 13 minutes", "2°13'"), ("1-5", "1–5")])
def test_ways_of_writing_one_number_are_one_answer(said: str, meant: str) -> None:
    assert exact_answer(said, meant)


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("Answer: Ketu\nRule: x\nConfidence: High", True),
        ("Confidence: High\nanswer:  KETU. ", True),
        ("Ketu", True),
        ("Answer: Ketu and Venus\nRule: x", False),
        ("Answer: Venus\nRule: Ketu rules it", False),
        ("", False),
    ],
)
def test_exact_answer(text: str, exact: bool) -> None:
    assert exact_answer(text, "Ketu") is exact


def test_the_whole_text_counts_where_no_line_is_an_answer() -> None:
    assert answer_part("It is Ketu.\n") == "It is Ketu."


def test_rates_overall_by_kind_and_by_language() -> None:
    def question(kind: str, language: str) -> Question:
        return Question(prompt=[{"role": "user", "content": "?"}], reference="", expected="Ketu", kind=kind, language=language)

    questions = [question("lord", "english"), question("lord", "hinglish"), question("year", "english"), question("", "")]
    rates = exact_rates(questions, ["Ketu", "Venus", "ketu.", "Sun"])
    assert rates.overall == 0.5
    assert rates.by_kind == {"lord": 0.5, "year": 1.0}
    assert rates.by_language == {"english": 1.0, "hinglish": 0.0}


def test_format_rates() -> None:
    answers = ["Answer: x\nRule: y\nConfidence: High", "Answer: x\nRule:\nConfidence: Sure", "Rule: z"]
    assert format_rates(FORMATS, answers) == {"cites_rule": pytest.approx(2 / 3), "gives_confidence": pytest.approx(1 / 3)}


def test_a_format_that_is_no_expression_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        format_rates({"broken": "("}, ["x"])
    assert caught.value.param == "params.formats.broken"


def test_batched_generation_gives_what_each_prompt_gives_alone(line: Line) -> None:
    import torch

    conversations = [[{"role": "user", "content": text}] for text in ("Ketu?", "Who is the lord of the ninth star of them all?", "x")]
    with loaded("base", line.root / "base") as model:
        prompts = [prompt_ids(model.tokenizer, conversation) for conversation in conversations]
        answers = generate_ids(model, prompts, max_new_tokens=5, meter=_meter())
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                for _ in range(5):  # by hand, without a cache
                    ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], dim=1)
            by_hand = ids[0, len(prompt) :].tolist()
            cut = next((i for i, token in enumerate(by_hand) if token in model.stop_ids), len(by_hand))
            assert answer == by_hand[:cut]
    assert len({tuple(answer) for answer in answers}) > 1


def test_no_room_for_an_answer_is_named(line: Line) -> None:
    with loaded("base", line.root / "base") as model, pytest.raises(InvalidRequest, match="512 positions"):
        generate_ids(model, [[1, 2]], max_new_tokens=512, meter=_meter())


def test_a_wish_to_stop_ends_generation(line: Line, tmp_path: Path) -> None:
    with loaded("base", line.root / "base") as model:
        stop.request()
        try:
            with pytest.raises(Preempted):
                generate_ids(model, [[1, 2]], max_new_tokens=400, meter=_meter())
        finally:
            stop.clear()


def _meter() -> Meter:
    return Meter(SilentProgress(), total=100)
