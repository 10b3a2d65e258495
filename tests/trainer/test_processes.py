"""The stages as processes of their own: killed, terminated and continued bit by bit, with Unsloth and with plain TRL."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from parampara.errors import EXIT_BAD_INPUT, EXIT_OK, EXIT_PREEMPTED
from parampara.manifest import sha256_file
from parampara.schemas.stages import DaptConfig, SftConfig, TrainResult
from tests.trainer.runs import dapt_config, losses, sft_config, start, steps_reported, write_book, write_qa

STOP_SECONDS = 5.0
"""From a signal to the end of the process, in its own processor time, so that a busy test machine changes nothing."""
ADAPTER = Path("output") / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH with a shell and a few tools, and no C compiler."""
    folder = tmp_path_factory.mktemp("bin")
    for tool in ("sh", "env", "uname", "ldconfig"):
        if found := shutil.which(tool) or shutil.which(tool, path="/sbin:/usr/sbin"):
            (folder / tool).symlink_to(found)
    assert shutil.which("gcc", path=str(folder)) is None
    return str(folder)


def finish(process: subprocess.Popen[bytes], workdir: Path, *, code: int = EXIT_OK, within: float = 240) -> None:
    assert process.wait(timeout=within) == code, (workdir / "log").read_text(encoding="utf-8")[-3000:]


def interrupt(config: DaptConfig | SftConfig, workdir: Path, number: signal.Signals, *, after_step: int, path: str) -> int:
    """Start the stage, send the signal once it reports ``after_step``, return the exit code."""
    progress = workdir / "progress.jsonl"
    earlier = progress.stat().st_size if progress.exists() else 0  # of the attempt before
    spent = _children_seconds()
    process = start(config, workdir, path=path)
    try:
        while steps_reported(workdir, since=earlier) < after_step:
            assert process.poll() is None, (workdir / "log").read_text(encoding="utf-8")[-3000:]
            time.sleep(0.005)
        used = sum(psutil.Process(process.pid).cpu_times()[:2])
        process.send_signal(number)
        code = process.wait(timeout=120)
        assert _children_seconds() - spent - used < STOP_SECONDS
        return code
    finally:
        process.kill()
        process.wait()


def _children_seconds() -> float:
    """Processor time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def outcome(workdir: Path) -> TrainResult:
    return TrainResult.model_validate_json((workdir / "result.json").read_bytes())


def configuration(kind: str, base: Path, folder: Path, backend: str) -> DaptConfig | SftConfig:
    if kind == "dapt":
        return dapt_config(base, write_book(folder / "book.txt", paragraphs=40), backend=backend, epochs=3, checkpoint_steps=2)
    return sft_config(base, write_qa(folder / "qa.jsonl", rows=60), backend=backend, epochs=2, checkpoint_steps=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("kind", "backend"), [("dapt", "unsloth"), ("sft", "trl")])
def test_killed_terminated_and_continued_equals_uninterrupted(kind: str, backend: str, base: Path, tmp_path: Path, bare_path: str) -> None:
    """Also: nothing needs a C compiler, and no generated code lands in the current directory."""
    config = configuration(kind, base, tmp_path, backend)
    elsewhere = tmp_path / "cwd"
    elsewhere.mkdir()
    finish(start(config, tmp_path / "whole", cwd=elsewhere, path=bare_path), tmp_path / "whole")
    assert os.listdir(elsewhere) == []
    parts = tmp_path / "parts"
    assert interrupt(config, parts, signal.SIGKILL, after_step=5, path=bare_path) == -signal.SIGKILL
    assert not (parts / "output").exists()
    assert interrupt(config, parts, signal.SIGTERM, after_step=11, path=bare_path) == EXIT_PREEMPTED
    assert json.loads((parts / "error.json").read_text())["error"]["code"] == "preempted"
    finish(start(config, parts, path=bare_path), parts)
    whole, result = outcome(tmp_path / "whole"), outcome(parts)
    assert result.resumed_from_step >= 11
    assert result.backend == whole.backend == backend
    assert sha256_file(parts / ADAPTER) == sha256_file(tmp_path / "whole" / ADAPTER)
    assert losses(parts) == losses(tmp_path / "whole")
    assert result.validation_loss_after == whole.validation_loss_after
    assert result.trained_tokens == whole.trained_tokens


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["dapt", "sft"])
def test_both_backends_give_the_same_curve(kind: str, base: Path, tmp_path: Path, bare_path: str) -> None:
    for backend in ("auto", "trl"):
        finish(start(configuration(kind, base, tmp_path, backend), tmp_path / backend, path=bare_path), tmp_path / backend)
    auto, plain = outcome(tmp_path / "auto"), outcome(tmp_path / "trl")
    assert auto.backend == "unsloth"
    assert "auto" in auto.backend_reason
    assert plain.backend == "trl"
    assert losses(tmp_path / "auto") == pytest.approx(losses(tmp_path / "trl"), abs=2e-3)
    assert auto.validation_loss_before == pytest.approx(plain.validation_loss_before, abs=1e-5)
    assert auto.validation_loss_after == pytest.approx(plain.validation_loss_after, abs=2e-3)
    described = [(tmp_path / backend / "output" / "adapter_config.json").read_text() for backend in ("auto", "trl")]
    assert described[0] == described[1]
    tensors = [load_file(str(tmp_path / backend / ADAPTER)) for backend in ("auto", "trl")]
    assert {n: (t.shape, t.dtype) for n, t in tensors[0].items()} == {n: (t.shape, t.dtype) for n, t in tensors[1].items()}


def test_bad_input_is_told_by_exit_code_and_file(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "qa.jsonl"
    empty.write_bytes(b"")
    finish(start(sft_config(base, empty), tmp_path / "work"), tmp_path / "work", code=EXIT_BAD_INPUT)
    error = json.loads((tmp_path / "work" / "error.json").read_text())["error"]
    assert error["code"] == "invalid_data"
    assert "qa.jsonl: the file is empty (0 bytes)" in error["message"]
    assert not (tmp_path / "work" / "output").exists()
