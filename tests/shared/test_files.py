"""Names of files: a label is safe whatever a client sends, and never reaches a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parampara.errors import NotFound
from parampara.files import SUFFIXES, path_of, safe_label, suffix_of
from parampara.settings import Settings

FILE_ID = "file-" + "0a" * 12


@given(st.text(st.characters()))
def test_a_label_is_short_plain_and_stable(name: str) -> None:
    label = safe_label(name)
    assert 1 <= len(label) <= 80
    assert not set(label) & set("/\\\x00\n\r\u202e\u200b")
    assert label.encode("utf-8")
    assert label not in (".", "..")
    assert safe_label(label) == label


@given(st.text(st.characters()))
def test_bytes_always_lie_directly_in_the_folder_of_files(name: str) -> None:
    settings = Settings(home=Path("/srv/home"))
    path = path_of(settings, FILE_ID, name)
    assert path.parent == settings.files_dir
    assert path.name.removeprefix(FILE_ID) in ("", *SUFFIXES)


@pytest.mark.parametrize("file_id", ["", "file-", "../x", "file-../../etc", FILE_ID + "\n", FILE_ID.upper(), "run_" + "0" * 24])
def test_what_is_no_file_id_never_becomes_a_path(file_id: str) -> None:
    with pytest.raises(NotFound, match="was never uploaded"):
        path_of(Settings(), file_id, "a.txt")


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.PDF", ".pdf"), ("a.tar.gz", ""), ("a.jsonl", ".jsonl"), (".txt", ""), ("a", ""), ("a.txt.exe", "")]
)
def test_only_known_suffixes_are_kept(name: str, suffix: str) -> None:
    assert suffix_of(name) == suffix
