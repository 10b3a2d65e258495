"""One tiny base, one book and one question-answer file for all trainer tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_models import make_model
from tests.trainer.runs import write_book, write_qa


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("trainer") / "base")


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_book(tmp_path_factory.mktemp("trainer") / "book.txt")


@pytest.fixture(scope="session")
def qa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qa(tmp_path_factory.mktemp("trainer") / "qa.jsonl")
