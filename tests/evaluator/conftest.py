"""One tiny line for all tests of the evaluator; a test that damages it works on a copy."""

from __future__ import annotations

import pytest

from tests.evaluator.lines import Line, add_dpo, make_line


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return make_line(tmp_path_factory.mktemp("line"))


@pytest.fixture(scope="session")
def dpo_line(line: Line) -> Line:
    """The same with what follows stage dpo, to be had by ``dpo_config``."""
    add_dpo(line)
    return line
