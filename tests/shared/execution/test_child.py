"""The command line of a service, as a person at a terminal meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parampara.errors import EXIT_BUSY, WorkdirBusy
from parampara.execution import child
from tests.shared.execution.conftest import PYTHONPATH


@pytest.fixture
def command(tmp_path: Path) -> Any:
    """Start ``python -m sleepy dapt`` with these orders; ``config`` overrides the whole configuration."""

    def start(config: str | None = None, name: str = "config.yaml", **orders: Any) -> subprocess.Popen[str]:
        book = tmp_path / "book.txt"
        book.write_text(json.dumps({"steps": 3, "seconds": 0, **orders}))
        text = config if config is not None else f"model: {tmp_path}\ndata:\n  train: [{book}]\nseed: 7\n"
        (tmp_path / name).write_text(text)
        arguments = ["dapt", "--config", str(tmp_path / name), "--workdir", str(tmp_path / "work")]
        return subprocess.Popen(
            [sys.executable, "-m", "sleepy", *arguments], env={**os.environ, "PYTHONPATH": PYTHONPATH}, stderr=subprocess.PIPE, text=True
        )

    return start


def test_a_stage_by_hand_leaves_a_readable_directory(command: Any, tmp_path: Path) -> None:
    process = command()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert "-- train" in errors
    assert "3/3" in errors
    result = json.loads((tmp_path / "work" / "result.json").read_text())
    assert (result["steps"], result["output"]) == (3, str(tmp_path / "work" / "output"))
    assert (tmp_path / "work" / "output" / "adapter.txt").read_text() == "dapt 3 steps, seed 7"
    lines = [json.loads(line) for line in (tmp_path / "work" / "progress.jsonl").read_text().splitlines()]
    assert [line["type"] for line in lines] == ["phase", "step", "step", "step"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("model: /m\ndata: {train: [/b]}\nparams: {lora: {rank: 8}}\n", "config.params.lora.rank is not a known key"),
        ("model: /m\ndata: {train: []}\n", "config.data.train"),
        ("model: [unclosed", "Cannot read the configuration"),
    ],
)
def test_a_bad_configuration_is_exit_78_with_the_path_to_the_fault(command: Any, tmp_path: Path, config: str, said: str) -> None:
    process = command(config)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 78
    assert said in errors
    assert "Traceback" not in errors
    assert said in json.loads((tmp_path / "work" / "error.json").read_text())["error"]["message"]


def test_scientific_notation_in_json_is_a_number(command: Any, tmp_path: Path) -> None:
    book = {"train": [str(tmp_path / "book.txt")]}
    rate = '{"model": "/m", "data": %s, "params": {"train": {"learning_rate": 1e-05}}}' % json.dumps(book)  # noqa: UP031
    process = command(rate, name="config.json")
    assert process.wait(60) == 0, process.stderr.read()


def test_sigterm_asks_for_a_checkpoint_and_exit_75(command: Any, tmp_path: Path) -> None:
    process = command(steps=10_000, seconds=0.01)
    trace = tmp_path / "work" / "trace.jsonl"
    deadline = time.monotonic() + 60
    while not trace.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert json.loads((tmp_path / "work" / "error.json").read_text())["error"]["code"] == "preempted"


def test_a_workdir_has_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_LOCK_WAIT_SECONDS", 0.2)
    with child._lock(tmp_path), pytest.raises(WorkdirBusy, match=f"process {os.getpid()} on .* still works") as caught:
        child._lock(tmp_path)
    assert caught.value.exit_code == EXIT_BUSY
    child._lock(tmp_path).close()
