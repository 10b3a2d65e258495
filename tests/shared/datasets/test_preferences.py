"""Reading preference rows: three forms in, one form out, every fault named with its line; a question stays on one side of a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parampara.datasets import Message, count_asked_in_both, hold_out, read_preferences, read_qa, validate_preferences
from parampara.datasets.rows import MAX_ROW_BYTES
from parampara.errors import InvalidData

GOOD = {"question": "Who rules Ashwini?", "chosen": "Ketu", "rejected": "Venus"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def turns(*said: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in said]


def openai(prompt: Any, better: Any, worse: Any) -> dict[str, Any]:
    return {"input": {"messages": prompt, "tools": []}, "preferred_output": better, "non_preferred_output": worse}


def trl(prompt: Any, better: Any, worse: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": better, "rejected": worse}


ASKED = turns(("system", "Be brief."), ("user", "Who rules Ashwini?"), ("assistant", "Ketu"), ("user", "Sure? \u200b"))
BETTER, WORSE = turns(("assistant", " Yes. ")), turns(("assistant", "No."))


@pytest.mark.parametrize("form", [openai, trl])
def test_conversations_keep_their_turns(tmp_path: Path, form: Any) -> None:
    row = {**form(ASKED, BETTER, WORSE), "metadata": {"kind": "star_lord", "source": "re\0view"}}
    (read,) = read_preferences(write(tmp_path / "p.jsonl", row))
    said = [("system", "Be brief."), ("user", "Who rules Ashwini?"), ("assistant", "Ketu"), ("user", "Sure?")]
    assert read.prompt == [Message(role, content) for role, content in said]  # type: ignore[arg-type]
    assert (read.chosen, read.rejected) == ("Yes.", "No.")
    assert read.metadata == {"kind": "star_lord", "source": "review"}
    assert read.asked == "Who rules Ashwini?\nSure?"
    assert "Be brief" not in read.text and {"chosen: Yes.", "rejected: No."} < set(read.text.splitlines())


@pytest.mark.parametrize("column", ["question", "prompt"])
def test_plain_texts_become_a_users_message(tmp_path: Path, column: str) -> None:
    (row,) = read_preferences(write(tmp_path / "p.jsonl", {column: " Who?\r\n", "chosen": "I", "rejected": "You"}))
    assert (row.prompt, row.chosen, row.rejected) == ([Message("user", "Who?")], "I", "You")


ASKS = turns(("user", "a"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not json", "line 2: not JSON (Expecting value: line 1 column 1 (char 0)); a preference file has one"),
        ('["a"]', "line 2: a row is a JSON object, not list"),
        ({"question": "a", "answer": "b"}, "columns ['answer', 'question'] are none of the accepted forms"),
        ({"chosen": BETTER, "rejected": WORSE}, "columns ['chosen', 'rejected'] are none of the accepted forms"),
        ({**GOOD, "prompt": "a"}, "columns ['chosen', 'prompt', 'question', 'rejected'] are none of the accepted forms"),
        ({**GOOD, "rejected": " Ketu\u200b "}, "the better answer and the worse one are equal"),
        (openai(ASKS, BETTER, BETTER), "the better answer and the worse one are equal"),
        ({**GOOD, "question": " "}, "line 2: question is empty"),
        ({**GOOD, "chosen": ""}, "line 2: chosen is empty"),
        ({**GOOD, "rejected": None}, "line 2: rejected is empty"),
        ({**GOOD, "rejected": 3}, "line 2: rejected is text, not int"),
        ({**GOOD, "metadata": [1]}, "metadata is an object, not list"),
        ({**GOOD, "question": ASKS}, "line 2: question is text, not list"),
        (trl(ASKS, "better", WORSE), "chosen is a list of one assistant's message"),
        (trl("a", BETTER, WORSE), "chosen is text, not list"),
        (trl([], BETTER, WORSE), "prompt is a list of messages that ends with the user's"),
        (trl([*ASKS, *BETTER], BETTER, WORSE), "prompt ends with the assistant's message"),
        (trl(turns(("user", "  ")), BETTER, WORSE), "prompt ends with an empty message"),
        (trl(turns(("tool", "a")), BETTER, WORSE), "prompt[0].role is 'tool'"),
        (trl(turns(("user", "a"), ("system", "b")), BETTER, WORSE), "prompt[1].role is 'system'; only the first"),
        (trl(ASKS * 257, BETTER, WORSE), "257 messages, above the limit of 256"),
        (openai(None, BETTER, WORSE), "input.messages is a list of messages"),
        ({**openai(ASKS, BETTER, WORSE), "input": "a"}, "input.messages is a list of messages"),
        (openai(ASKS, ASKS, WORSE), "preferred_output[0].role is 'user'; an answer is the assistant's"),
        (openai(ASKS, BETTER, [*WORSE, *WORSE]), "non_preferred_output is a list of one assistant's message"),
        (openai(ASKS, BETTER, turns(("assistant", " "))), "non_preferred_output is empty"),
        (openai(ASKS, BETTER, turns(("assistant", None))), "non_preferred_output[0] is"),
        ({**GOOD, "chosen": "x" * MAX_ROW_BYTES}, "longer than"),
    ],
)
def test_faulty_rows_name_line_and_rule(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "file-9.jsonl", GOOD, row)
    with pytest.raises(InvalidData) as fault:
        read_preferences(path, "my pairs.jsonl")
    assert message in fault.value.message
    assert fault.value.message.startswith("my pairs.jsonl line 2")
    with pytest.raises(InvalidData, match=r"^file-9\.jsonl line 2"):
        validate_preferences([path])


@pytest.mark.parametrize(("content", "message"), [(b"", "0 bytes"), (b"\n \n", "holds no row"), (b'{"question": "\xff"}', "not UTF-8")])
def test_empty_and_undecodable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    for check in (lambda: read_preferences(path), lambda: validate_preferences([path])):
        with pytest.raises(InvalidData) as fault:
            check()
        assert message in fault.value.message


def test_one_row_is_too_few_and_repeats_do_not_count(tmp_path: Path) -> None:
    for rows in ([GOOD], [GOOD, GOOD, {**GOOD, "question": "who  rules ashwini?"}]):
        with pytest.raises(InvalidData, match="at least 2 distinct rows"):
            validate_preferences([write(tmp_path / "p.jsonl", *rows)])
    with pytest.raises(InvalidData, match="No preference file"):
        validate_preferences([])


def test_rows_of_several_files_count_together(tmp_path: Path) -> None:
    other = {**GOOD, "rejected": "Mars"}
    one, two = write(tmp_path / "1.jsonl", GOOD), write(tmp_path / "2.jsonl", other, GOOD)
    assert validate_preferences([one, two], ["a.jsonl", "b.jsonl"]) == 2


def test_one_question_is_too_few_where_some_are_to_be_held_out(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, {**GOOD, "rejected": "Mars"})
    assert validate_preferences([path]) == 2
    with pytest.raises(InvalidData, match=r"p\.jsonl: all 2 pairs are about one question"):
        validate_preferences([path], split=True)
    other = write(tmp_path / "q.jsonl", {**GOOD, "question": "Who rules Bharani?"})
    assert validate_preferences([path, other], split=True) == 3


def test_pairs_about_one_question_are_held_out_together_and_known_from_the_questions_of_sft(tmp_path: Path) -> None:
    rows = [{"question": f"Star {number}?", "chosen": "Ketu", "rejected": worse} for number in range(6) for worse in ("Sun", "Moon")]
    pairs = read_preferences(write(tmp_path / "p.jsonl", *rows))
    train, held = hold_out(pairs, fraction=0.4, seed=3, content=lambda row: row.asked)
    assert len(held) == 4 and not {row.asked for row in train} & {row.asked for row in held}
    questions = read_qa(write(tmp_path / "qa.jsonl", {"question": "star  3?", "answer": "Moon"}, {"question": "Star 9?", "answer": "Sun"}))
    assert count_asked_in_both(pairs, questions) == 1
