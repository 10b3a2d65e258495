"""A stage in two processes on a CPU: the training of one process, exact after every kind of end, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from parampara.errors import EXIT_OK, EXIT_OUT_OF_MEMORY, EXIT_PREEMPTED, InvalidRequest
from parampara.manifest import sha256_file
from parampara.progress import SilentProgress
from parampara.schemas.stages import DaptConfig, SftConfig, TrainResult
from tests.trainer.runs import dapt_config, losses, sft_config, start, write_qa
from tests.trainer.several import Attempt, Dies, Fails, error, finished
from trainer import ranks, sft, shares
from trainer.__main__ import _preloadable
from trainer.backends import choose
from trainer.layout import Layout
from trainer.ranks import Group
from trainer.rows import TokenRow

ADAPTER = Path("output") / "adapter_model.safetensors"
STOP_SECONDS = 5.0
"""From SIGTERM to the end of the stage, in the processor time of both processes."""


def in_processes(config: DaptConfig | SftConfig, processes: int, *, dropout: float = 0.05) -> Any:
    changed = config.model_copy(deep=True)
    changed.machine.processes = processes
    assert changed.params.lora is not None
    changed.params.lora.lora_dropout = dropout
    return changed


def validations(workdir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


def facts(workdir: Path) -> dict[str, Any]:
    """What must be equal for one to be resumed, of the newest checkpoint."""
    newest = max((workdir / "checkpoints").iterdir())
    return json.loads((newest / "MANIFEST.json").read_text(encoding="utf-8"))["facts"]


def assert_close(one: Path, two: Path) -> None:
    """The curves within 1e-4, the adapters within a hundredth of what was learnt."""
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert validations(two) == pytest.approx(validations(one), rel=1e-4)
    tensors = [load_file(str(workdir / ADAPTER)) for workdir in (one, two)]
    assert {name: (t.shape, t.dtype) for name, t in tensors[0].items()} == {name: (t.shape, t.dtype) for name, t in tensors[1].items()}
    for name, tensor in tensors[0].items():
        assert float((tensors[1][name] - tensor).norm()) <= 0.01 * float(tensor.norm()), name
    assert (one / "output" / "adapter_config.json").read_bytes() == (two / "output" / "adapter_config.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dapt", "sft"])
def test_two_processes_train_what_one_does(kind: str, base: Path, book: Path, qa: Path, tmp_path: Path) -> None:
    """With micro-batches that one process has more of than the other, and the adapter of a best step that is not the last."""
    settings: dict[str, Any] = {"max_tokens_per_batch": 48, "max_steps": 6, "checkpoint_steps": 1}
    if kind == "dapt":
        config: DaptConfig | SftConfig = dapt_config(base, book, max_grad_norm=0.1, **settings)
    else:
        turning = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "eval_steps": 1, "load_best": True}
        config = sft_config(base, qa, **settings, **turning)
    config.tracking.report_to = ["tensorboard"]
    one = finished(in_processes(config, 1, dropout=0), tmp_path / "one")
    two = finished(in_processes(config, 2, dropout=0), tmp_path / "two")
    assert (one.processes, two.processes) == (1, 2)
    assert len(list((tmp_path / "two" / "tracking").rglob("events.out.*"))) == 1
    assert_close(tmp_path / "one", tmp_path / "two")
    assert (two.steps, two.trained_tokens, two.adapter_step, two.best_step) == (
        one.steps,
        one.trained_tokens,
        one.adapter_step,
        one.best_step,
    )
    assert facts(tmp_path / "two") == {
        **facts(tmp_path / "one"),
        "processes": 2,
    }  # dropout is drawn otherwise: neither goes on as the other
    # else this shows nothing of load_best, and nothing of the passes of a process that has nothing left to learn
    assert two.adapter_step != two.steps if kind == "sft" else two.packing_efficiency != one.packing_efficiency == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_killed_terminated_and_continued_equals_uninterrupted(base: Path, tmp_path: Path) -> None:
    """With dropout, which differs by process; the uninterrupted run is that of the command, with a process started from nothing."""
    config = in_processes(sft_config(base, write_qa(tmp_path / "qa.jsonl", rows=60), epochs=1.5, checkpoint_steps=2), 2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    uninterrupted = start(config, whole)

    attempt = Attempt(config, parts)  # one process dies: the stage ends with it, and says so
    (follower,) = attempt.at_step(3)
    follower.kill()
    assert attempt.code(within=20) == 1
    assert error(parts)["code"] == "process_died"
    assert "Process 2 of the 2 that train together was killed by SIGKILL" in error(parts)["message"]
    assert attempt.left() == []

    attempt = Attempt(config, parts)  # the stage process dies: the other one does with it
    (follower,) = attempt.at_step(7)
    os.kill(attempt.pid, signal.SIGKILL)
    assert attempt.code() == -signal.SIGKILL
    psutil.wait_procs([follower], timeout=10)
    assert attempt.left() == []

    attempt = Attempt(config, parts)  # asked to stop, of which the other process hears from this one
    (follower,) = attempt.at_step(11)
    assert attempt.seconds_to_stop([psutil.Process(attempt.pid), follower]) < STOP_SECONDS
    assert attempt.code() == EXIT_PREEMPTED, attempt.log()
    assert error(parts)["code"] == "preempted"
    assert attempt.left() == []

    result = finished(config, parts)
    assert result.resumed_from_step >= 11
    assert uninterrupted.wait(timeout=200) == EXIT_OK, (whole / "log").read_text(encoding="utf-8")[-3000:]
    expected = TrainResult.model_validate_json((whole / "result.json").read_bytes())
    assert sha256_file(parts / ADAPTER) == sha256_file(whole / ADAPTER)
    assert losses(parts) == losses(whole)
    assert result.validation_loss_after == expected.validation_loss_after
    assert result.trained_tokens == expected.trained_tokens
    assert facts(parts)["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "rank", "code", "name", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, EXIT_OUT_OF_MEMORY, "out_of_memory", "Halve max_tokens"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 0, EXIT_OUT_OF_MEMORY, "out_of_memory", "Halve max_tokens"),
        (
            ZeroDivisionError("of nothing"),
            1,
            1,
            "process_died",
            "Process 2 of the 2 that train together failed: ZeroDivisionError: of noth",
        ),
    ],
)
def test_an_error_in_any_process_is_that_of_the_stage(
    raised: Exception, rank: int, code: int, name: str, text: str, base: Path, qa: Path, tmp_path: Path
) -> None:
    attempt = Attempt(in_processes(sft_config(base, qa), 2), tmp_path, setup=Fails(raised, rank=rank, step=3))
    assert attempt.code() == code, attempt.log()
    assert error(tmp_path)["code"] == name
    assert text in error(tmp_path)["message"]
    assert attempt.left() == []


@pytest.mark.slow
def test_a_death_that_a_library_takes_for_something_else_is_told_as_what_it_is(base: Path, qa: Path, tmp_path: Path) -> None:
    """The layout is tried in passes that may fail in any way; a lost process is none of them."""
    attempt = Attempt(in_processes(sft_config(base, qa), 2), tmp_path, setup=Dies(1))
    assert attempt.code() == 1
    assert error(tmp_path)["code"] == "process_died", attempt.log()


def _stuck(workdir: Path) -> None:
    """A main thread that waits in a kernel for a process that is gone."""
    ranks._LAST_WORDS_SECONDS = ranks._GRACE_SECONDS = 0.1

    class Gone:
        def poll(self) -> int:
            return -signal.SIGKILL

    ranks._Watch([Gone()], workdir=workdir).start()  # type: ignore[list-item]
    time.sleep(60)


def test_a_stage_ends_although_its_main_thread_is_stuck(tmp_path: Path) -> None:
    process = get_context("forkserver").Process(target=_stuck, args=(tmp_path,))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert error(tmp_path)["code"] == "process_died"


@pytest.mark.parametrize(
    ("backend", "four_bits", "gpus", "asked", "expected"),
    [
        ("auto", False, 0, 1, 1),
        ("auto", False, 0, 2, 2),
        ("trl", False, 4, 1, 1),
        ("trl", False, 4, 4, 4),
        ("auto", False, 4, 8, "8 processes, a GPU each, and 4 are visible; set PARAMPARA_WORKER__PROCESSES=4"),
        ("unsloth", False, 4, 1, 1),
        ("unsloth", False, 4, 2, (1, "one process trains, and not 2: backend is unsloth")),
        ("auto", True, 4, 2, (1, "one process trains, and not 2: load_in_4bit is true")),
    ],
)
def test_how_many_processes_train(
    backend: str, four_bits: bool, gpus: int, asked: int, expected: Any, base: Path, qa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = in_processes(sft_config(base, qa, backend=backend, load_in_4bit=four_bits), asked)
    if isinstance(expected, str):
        with pytest.raises(InvalidRequest, match=expected):
            ranks.processes(config)
        return
    wanted, why = expected if isinstance(expected, tuple) else (expected, None)
    count, reason = ranks.processes(config)
    assert count == wanted
    assert reason is None if why is None else reason is not None and reason.startswith(why)


def test_whole_weights_train_in_one_process(base: Path, qa: Path) -> None:
    config = in_processes(sft_config(base, qa), 2)
    params = config.params.model_copy(update={"lora": None})
    assert ranks.processes(config.model_copy(update={"params": params})) == (
        1,
        "one process trains, and not 2: lora is null, and whole weights are not sharded",
    )


def test_a_refused_stage_starts_nothing(base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidRequest, match="and 1 are visible") as refused:
        sft.run(in_processes(sft_config(base, qa), 2), workdir=tmp_path, progress=SilentProgress())
    assert refused.value.param == "machine.processes"
    assert list(tmp_path.iterdir()) == []


def test_auto_takes_the_backend_that_trains_in_several_processes(tmp_path: Path) -> None:
    choice = choose("auto", cache=tmp_path, processes=2)
    assert choice.name == "trl"
    assert choice.reason == "backend is auto and Unsloth trains on one GPU, not in 2 processes"


@pytest.mark.parametrize(("backend", "processes", "preloaded"), [("auto", 2, "trl"), ("trl", 2, "trl"), ("auto", 1, "unsloth")])
def test_a_stage_is_forked_from_the_libraries_that_it_trains_with(
    backend: str, processes: int, preloaded: str, base: Path, qa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_processes(sft_config(base, qa, backend=backend), processes)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    assert _preloadable(config) == (preloaded == "trl")
    monkeypatch.setitem(sys.modules, "unsloth", None)
    assert _preloadable(config) == (preloaded == "unsloth")


def test_each_rank_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ranks._devices(2) == [None, None]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ranks._devices(2) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f1e,0")
    assert ranks._devices(2) == ["3", "GPU-5f1e"]


@pytest.mark.parametrize("kind", ["flat", "padded"])
@pytest.mark.parametrize("lengths", [[40, 40, 40, 9, 7, 5], [3], [60, 4, 4, 4, 4, 4, 4]])
def test_ranks_share_a_step_and_have_as_many_passes(kind: Any, lengths: list[int]) -> None:
    layout = Layout(kind, "", max_tokens=48, pad_token_id=0)
    rows = [TokenRow([number] * length, [-100, *[number] * (length - 1)]) for number, length in enumerate(lengths, 1)]
    passes = [shares.micro_batches(rows, layout, Group(rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in passes}) == 1
    counted = [batch for batches in passes for batch in batches if shares.IDLE not in batch]
    learnt = torch.cat([batch["labels"][batch["labels"] > 0] for batch in counted])
    assert sorted(learnt.tolist()) == sorted(number for number, length in enumerate(lengths, 1) for _ in range(length - 1))


def test_shares_are_of_about_the_same_length() -> None:
    lengths = [97, 5, 88, 41, 40, 12, 60, 33, 2, 71]
    held = [sum(lengths[item] for item in share) for share in shares.balanced(lengths, 3)]
    assert sum(held) == sum(lengths)
    assert max(held) <= 1.1 * sum(lengths) / 3


@pytest.mark.parametrize("items", [0, 1, 4, 6, 7])
def test_what_is_dealt_out_gives_each_rank_as_much(items: int) -> None:
    hands = [list(Group(rank, 3).deal(range(items))) for rank in range(3)]
    assert len({len(hand) for hand in hands}) == 1
    assert sorted(item for hand in hands for item, counts in hand if counts) == list(range(items))
