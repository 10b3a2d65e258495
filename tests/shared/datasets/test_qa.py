"""Reading question-answer rows: three forms in, one form out, every fault named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parampara.datasets import Message, count_duplicates, read_qa, validate_qa
from parampara.datasets.rows import MAX_ROW_BYTES
from parampara.errors import InvalidData

GOOD = {"question": "Who rules Ashwini?", "answer": "Ketu"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_three_forms_become_messages(tmp_path: Path) -> None:
    rows = read_qa(
        write(
            tmp_path / "qa.jsonl",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ]
            },
            {**GOOD, "metadata": {"kind": "star_lord", "expected": "Ketu"}},
            {"instruction": "Translate", "input": "saat saal", "output": "seven years"},
            {"instruction": "Say hi", "output": "hi"},
        )
    )
    assert rows[0].messages[0] == Message("system", "Be brief.")
    assert (rows[1].question, rows[1].answer, rows[1].metadata["kind"]) == ("Who rules Ashwini?", "Ketu", "star_lord")
    assert rows[2].question == "Translate\n\nsaat saal"
    assert rows[3].messages == [Message("user", "Say hi"), Message("assistant", "hi")]


def test_metadata_is_cleaned_like_the_text(tmp_path: Path) -> None:
    (row, _) = read_qa(write(tmp_path / "qa.jsonl", {**GOOD, "metadata": {"expected": "Ke\0tu\u200b", "n": 3}}, GOOD))
    assert row.metadata == {"expected": "Ketu", "n": 3}


def chat(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("not json", "line 2: not JSON"),
        ('{"question": "a", "answer": "b", "n": %s}' % ("1" * 5000), "line 2: not JSON"),
        ('["a"]', "line 2: a row is a JSON object, not list"),
        ({"prompt": "a", "completion": "b"}, "columns ['completion', 'prompt'] are none of the accepted forms"),
        ({"question": "a", "answer": "  "}, "line 2: answer is empty"),
        ({"question": "", "answer": "b"}, "line 2: question is empty"),
        ({"question": "a", "answer": 3}, "line 2: answer is text, not int"),
        ({"question": "a", "answer": "b", "metadata": []} | {"metadata": [1]}, "metadata is an object, not list"),
        (chat(("user", "a")), "the last message is the user's"),
        (chat(("user", "a"), ("assistant", "")), "assistant's message is empty"),
        (chat(("assistant", "a")), "no message is the user's"),
        (chat(("tool", "a"), ("assistant", "b")), "messages[0].role is 'tool'"),
        (chat(("user", "a"), ("system", "s"), ("assistant", "b")), "only the first message may be"),
        (chat(("user", None), ("assistant", "b")), "messages[0] is"),
        ({"messages": []}, "messages is a list"),
        ({"question": "a", "answer": "x" * MAX_ROW_BYTES}, "longer than"),
    ],
)
def test_faulty_rows_name_line_and_rule(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "file-9.jsonl", GOOD, row)
    with pytest.raises(InvalidData) as fault:
        read_qa(path, "my qa.jsonl")
    assert message in fault.value.message
    assert fault.value.message.startswith("my qa.jsonl line 2")
    with pytest.raises(InvalidData):
        validate_qa([path])


@pytest.mark.parametrize(("content", "message"), [(b"", "0 bytes"), (b"\n \n", "holds no row"), (b'{"question": "\xff"}', "not UTF-8")])
def test_empty_and_undecodable_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_bytes(content)
    for check in (lambda: read_qa(path), lambda: validate_qa([path])):
        with pytest.raises(InvalidData) as fault:
            check()
        assert message in fault.value.message


def test_one_row_is_too_few_and_repeats_do_not_count(tmp_path: Path) -> None:
    for rows in ([GOOD], [GOOD, GOOD, {**GOOD, "question": "who  rules ashwini?"}]):
        with pytest.raises(InvalidData, match="at least 2 distinct rows"):
            validate_qa([write(tmp_path / "qa.jsonl", *rows)])


def test_rows_of_several_files_count_together(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.jsonl", GOOD), write(tmp_path / "2.jsonl", {"question": "Bharani?", "answer": "Venus"}, GOOD)
    assert validate_qa([one, two], ["a.jsonl", "b.jsonl"]) == 2
    assert count_duplicates(read_qa(one) + read_qa(two)) == 1
