"""One tiny line for all tests of the evaluator; a test that damages it works on a copy."""

from __future__ import annotations

import pytest

from tests.evaluator.lines import Line, make_line


@pytest.fixture(scope="session")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    return make_line(tmp_path_factory.mktemp("line"))
