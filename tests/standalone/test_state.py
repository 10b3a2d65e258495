"""One stack per home folder, and how others find it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parampara.errors import Unavailable, WrongState
from standalone import state
from standalone.places import Places


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(project=tmp_path, home=tmp_path / "home")


def test_a_second_stack_on_the_same_home_is_refused_with_the_first_ones_address(places: Places) -> None:
    with state.only_stack(places):
        state.save(places, state.StackState(pid=4321, status="ready", gateway_url="http://127.0.0.1:1", ports={}))
        code = f"""
from pathlib import Path
from standalone import state
from standalone.places import Places
places = Places(project=Path("."), home=Path({str(places.home)!r}))
assert state.is_running(places)
with state.only_stack(places):
    pass
"""
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert WrongState.__name__ in other.stderr
    assert "pid 4321" in other.stderr
    assert "PARAMPARA_HOME" in other.stderr


def test_a_state_file_without_its_stack_counts_as_nothing(places: Places) -> None:
    assert not state.is_running(places)
    with state.only_stack(places):
        state.save(places, state.StackState(pid=os.getpid(), status="ready", gateway_url="http://127.0.0.1:1", ports={"gateway": 1}))
        assert state.running(places).base_url == "http://127.0.0.1:1/v1"
    with pytest.raises(Unavailable, match="parampara up"):
        state.running(places)


def test_a_damaged_state_file_is_no_state(places: Places) -> None:
    places.home.mkdir()
    places.state.write_text("{")
    assert state.load(places) is None
    assert state.leftovers(None) == []
