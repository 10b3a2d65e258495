"""A library in a process of its own: what it gets, that it tells of itself while it works, and that it ends when the stage does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from parampara.errors import Preempted
from parampara.execution import library_process


def test_it_gets_paths_and_threads_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HOME", "HF_TOKEN", "PARAMPARA_KEY_PEPPER", "LLM_COMPRESSOR_LOG_DISABLED"):
        monkeypatch.setenv(name, "1")
    given = library_process.environment()
    assert {"PATH", "OMP_NUM_THREADS", "HF_HOME"} <= given.keys()
    assert not {"HF_TOKEN", "PARAMPARA_KEY_PEPPER", "LLM_COMPRESSOR_LOG_DISABLED"} & given.keys()


def test_it_is_told_alive_while_its_log_grows_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_process, "REPORT_SECONDS", 0.1)
    said: list[int] = []
    talk = "import time\nfor number in range(8): print(number, flush=True); time.sleep(0.25)\n"
    assert run(tmp_path, talk, said) == 0
    assert len(said) >= 3
    silent: list[int] = []
    assert run(tmp_path, "import sys, time\ntime.sleep(1)\nsys.exit('out of luck')", silent) == 1
    assert silent == []
    assert library_process.last_lines(tmp_path / "log") == "out of luck"


def test_a_wish_to_stop_ends_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def check() -> None:
        if pid.exists() and pid.read_text():
            raise Preempted("stop")

    code = f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    with pytest.raises(Preempted):
        library_process.run(
            [sys.executable, "-c", code], cwd=tmp_path, environment={}, log=tmp_path / "log", check=check, alive=lambda: None
        )
    assert not Path(f"/proc/{pid.read_text()}").exists()


def run(tmp_path: Path, code: str, said: list[int]) -> int:
    command = [sys.executable, "-c", code]
    return library_process.run(
        command, cwd=tmp_path, environment={}, log=tmp_path / "log", check=lambda: None, alive=lambda: said.append(1)
    )
