"""Data that can not be trained on: refused by name before the model is loaded, and no adapter is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from parampara.errors import InvalidData
from parampara.progress import SilentProgress
from parampara.schemas.stages import QaData
from tests.shared.datasets.test_books import make_pdf
from tests.trainer.runs import dapt_config, sft_config, write_qa
from trainer import dapt, sft

LONG = '{"question": "' + "why " * 200 + '", "answer": "Because."}\n'
ONE = '{"question": "Who rules?", "answer": "Ketu"}\n'


class Phases(SilentProgress):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def phase(self, name: str, **data: object) -> None:
        self.seen.append(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt: the file is empty \(0 bytes\)"),
        ("blank.txt", b" \n\n ", r"blank\.txt: the file holds no text"),
        ("latin.txt", b"caf\xe9", r"latin\.txt: not UTF-8 \(byte 0xe9 at offset 3\)"),
        ("scan.pdf", None, r"scan\.pdf: the PDF holds no text, only pictures \(a scan\); run OCR"),
        ("short.txt", b"One sentence.", "bring more data"),
    ],
)
def test_books_that_teach_nothing(base: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is None:
        make_pdf(path, [None, None])
    else:
        path.write_bytes(content)
    progress = Phases()
    with pytest.raises(InvalidData, match=message):
        dapt.run(dapt_config(base, path), workdir=tmp_path / "work", progress=progress)
    assert progress.seen[-1] == "prepare data"
    assert not (tmp_path / "work" / "output").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"qa\.jsonl: the file is empty \(0 bytes\)"),
        (b"\n\n", r"qa\.jsonl: the file holds no row"),
        (b'{"question": "caf\xe9", "answer": "b"}\n', "line 1: not UTF-8"),
        ((LONG * 3).encode(), r"qa\.jsonl row 1: .* the first 96 \(max_seq_length\) hold nothing of the answer"),
        (ONE.encode() * 5, r"5 row\(s\), 1 distinct; at least 2 distinct rows"),
    ],
)
def test_questions_that_teach_nothing(base: Path, tmp_path: Path, content: bytes, message: str) -> None:
    path, held = tmp_path / "qa.jsonl", write_qa(tmp_path / "held.jsonl", rows=3)
    path.write_bytes(content)
    config = sft_config(base, path)
    if content.startswith(b'{"question": "why'):
        config = config.model_copy(update={"data": QaData(train=[path], validation=[held])})
    progress = Phases()
    with pytest.raises(InvalidData, match=message):
        sft.run(config, workdir=tmp_path / "work", progress=progress)
    assert progress.seen[-1] == "prepare data"
    assert not (tmp_path / "work" / "output").exists()
