"""Promises of training, each with its test: killed, warned, damaged, diverged, out of memory and out of disk, nothing is lost.

``PARAMPARA_CRASH_POINTS`` (per promise, 12 by default) sets how many moments are tried; see tests/README.md. The draws are seeded: a failure names
the moments, and the same ones are met again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from parampara.errors import EXIT_DISK_FULL, EXIT_DIVERGED, EXIT_OK, EXIT_PREEMPTED
from parampara.manifest import sha256_file
from parampara.schemas.stages import DaptConfig, SftConfig, TrainResult
from tests.tiny_models import make_model
from tests.trainer import crashing
from tests.trainer.crashing import attempt, told
from tests.trainer.runs import dapt_config, sft_config, write_book, write_qa
from trainer.checkpoints import MANIFEST

POINTS = int(os.environ.get("PARAMPARA_CRASH_POINTS", "12"))
PER_CHAIN = 4
"""Crashes in a row of one run before it is let through to its end."""
STOP_SECONDS = 5.0
ADAPTER = "output/adapter_model.safetensors"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 + 60 * POINTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("promises")
    make_model(folder / "base", hidden=32, layers=1)
    write_book(folder / "book.txt", paragraphs=16)
    write_qa(folder / "qa.jsonl", rows=24)
    return folder


def configuration(kind: str, folder: Path, **train: Any) -> DaptConfig | SftConfig:
    """Eight steps of two micro-batches, with dropout, evaluated on the way."""
    train = {"max_steps": 8, "checkpoint_steps": 2, "eval_steps": 3, **train}
    if kind == "sft":
        return sft_config(folder / "base", folder / "qa.jsonl", **train)
    return dapt_config(folder / "base", folder / "book.txt", packing=kind == "packed", **train)


KINDS = ["packed", "unpacked", "sft"]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Callable[[str], Path]:
    """The working directory of an uninterrupted run of that kind."""

    def run(kind: str) -> Path:
        workdir = folder / f"whole-{kind}"
        if not workdir.exists():
            assert attempt(configuration(kind, folder), workdir) == EXIT_OK, log(workdir)
        return workdir

    return run


def log(workdir: Path) -> str:
    return (workdir / "log").read_text(encoding="utf-8")[-3000:]


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything of a result that an exact resume leaves as it is."""
    result = TrainResult.model_validate_json((workdir / "result.json").read_bytes())
    changing = {"output", "seconds", "tokens_per_second", "peak_memory_bytes", "resumed_from_step", "mfu", "cost"}
    return result.model_dump(exclude=changing)


def curve(workdir: Path) -> list[Any]:
    """The lines of metrics.jsonl without speed, memory and cost."""
    import json

    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    measured = {"tokens_per_s", "eta_s", "peak_memory_bytes", "mfu", "cost"}
    return [{key: value for key, value in record.items() if key not in measured} for record in records]


def assert_equal_runs(one: Path, other: Path) -> None:
    assert sha256_file(one / ADAPTER) == sha256_file(other / ADAPTER)
    assert curve(one) == curve(other)
    assert outcome(one) == outcome(other)
    last = sorted(path.name for path in (one / "checkpoints").iterdir())[-1]
    for name in ("adapter.safetensors", "state.safetensors"):
        assert sha256_file(one / "checkpoints" / last / name) == sha256_file(other / "checkpoints" / last / name)


def chains(seed: int) -> list[tuple[str, list[float]]]:
    """Kinds in turn, each with the places (share of the moments of a whole run) where it is interrupted."""
    chance = random.Random(seed)
    places = [chance.random() for _ in range(POINTS)]
    parts = [places[start : start + PER_CHAIN] for start in range(0, POINTS, PER_CHAIN)]
    return [(KINDS[number % len(KINDS)], part) for number, part in enumerate(parts)]


def test_promise_7_killed_at_any_moment_and_continued_has_the_same_bits(whole: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    for number, (kind, places) in enumerate(chains(7)):
        reference, workdir = whole(kind), tmp_path / str(number)
        moments, tried = told(reference)["moments"], []
        for place in places:
            tried.append(1 + int(place * moments))
            code = attempt(configuration(kind, folder), workdir, at=tried[-1])
            # a run that goes on passes fewer moments: it may be through before it is killed
            assert code in (-signal.SIGKILL, EXIT_OK), (kind, tried, log(workdir))
        assert attempt(configuration(kind, folder), workdir) == EXIT_OK, (kind, tried, log(workdir))
        assert not list(workdir.glob(".output-*")), (kind, tried)
        assert_equal_runs(workdir, reference)


def test_promise_10_a_warning_costs_no_step_and_stops_in_time(whole: Callable[[str], Path], folder: Path, tmp_path: Path) -> None:
    for number, (kind, places) in enumerate(chains(10)):
        reference, workdir = whole(kind), tmp_path / str(number)
        moments, tried = told(reference)["moments"], []
        for place in places:
            tried.append(1 + int(place * moments))
            code = attempt(configuration(kind, folder), workdir, at=tried[-1], number=signal.SIGTERM)
            assert told(workdir)["seconds"] < STOP_SECONDS
            assert code in (EXIT_PREEMPTED, EXIT_OK), (kind, tried, log(workdir))
            steps = [record["step"] for record in curve(workdir) if "loss" in record]
            if code == EXIT_PREEMPTED and steps:
                newest = max(int(path.name.rpartition("-")[2]) for path in (workdir / "checkpoints").glob("step-*"))
                assert newest == max(steps), (kind, tried)
        assert attempt(configuration(kind, folder), workdir) == EXIT_OK, (kind, tried, log(workdir))
        assert_equal_runs(workdir, reference)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one bit": lambda path: path.write_bytes((data := path.read_bytes())[:-9] + bytes([data[-9] ^ 16]) + data[-8:]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


def test_promise_9_every_damage_to_every_file_of_a_real_checkpoint_is_noticed(
    whole: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    import json

    from trainer.checkpoints import CheckpointStore

    reference = whole("packed")
    facts = json.loads((reference / "checkpoints" / "step-0000000008" / MANIFEST).read_text())["facts"]
    names = sorted(path.name for path in (reference / "checkpoints" / "step-0000000008").iterdir())
    assert len(names) == 5
    for name in names:
        for how, damage in DAMAGES.items():
            root = tmp_path / f"{name}-{how}"
            shutil.copytree(reference / "checkpoints", root)
            damage(root / "step-0000000008" / name)
            found, skipped = CheckpointStore(root, facts=facts, keep=2).newest()
            assert found is not None and found.step == 6, (name, how)
            assert len(skipped) == 1, (name, how)
    workdir = tmp_path / "work"
    shutil.copytree(reference, workdir)
    DAMAGES["one bit"](workdir / "checkpoints" / "step-0000000008" / "state.safetensors")
    assert attempt(configuration("packed", folder), workdir) == EXIT_OK, log(workdir)
    assert "resumed from the checkpoint of step 6" in log(workdir)
    assert_equal_runs(workdir, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes file systems of so many KiB; needs the right to mount."""
    mounted: list[Path] = []

    def make(kibibytes: int) -> Path:
        path = tmp_path / f"disk-{kibibytes}"
        path.mkdir()
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(path)], capture_output=True, check=False)
        if made.returncode:
            pytest.skip("no right to mount a small file system here")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_promise_13_a_full_disk_loses_nothing(
    whole: Callable[[str], Path], folder: Path, small_disk: Callable[[int], Path], tmp_path: Path
) -> None:
    """Sizes from too small for anything to enough: each end has its name, and with room the run goes on to the same bits."""
    reference = whole("packed")
    needed = sum(-(-path.stat().st_size // 4096) * 4 for path in reference.rglob("*") if path.is_file())
    codes, sizes = [], max(4, POINTS // 2)
    for number in range(sizes):
        disk, notes = small_disk(8 + number * needed // sizes), tmp_path / f"notes-{number}"
        codes.append(attempt(configuration("packed", folder), disk / "work", notes=notes))
        if codes[-1] == EXIT_OK:
            continue
        assert codes[-1] == EXIT_DISK_FULL, (number, log(notes))
        assert not (disk / "work" / "output").exists()
        kept = sorted((disk / "work" / "checkpoints").glob("step-*"))
        assert all((path / MANIFEST).exists() for path in kept)
        subprocess.run(["mount", "-o", f"remount,size={needed * 4}k", str(disk)], check=True)
        if number % 2:
            assert attempt(configuration("packed", folder), disk / "work", notes=notes) == EXIT_OK, log(notes)
            if kept:
                assert f"resumed from the checkpoint of step {int(kept[-1].name.rpartition('-')[2])}" in log(notes)
            assert_equal_runs(disk / "work", reference)
    assert EXIT_DISK_FULL in codes


POISONS = ["loss", "gradient", "weights", "optimizer"]


@pytest.mark.parametrize("what", POISONS)
def test_promise_11_divergence_stops_within_a_step_and_keeps_nothing(what: str, folder: Path, tmp_path: Path) -> None:
    config = configuration("sft", folder, checkpoint_steps=1, eval_steps=None)
    for value in ("nan", "inf"):
        workdir = tmp_path / value
        setup = crashing.Poison(what, value, step=4)
        assert attempt(config, workdir, setup=setup) == EXIT_DIVERGED, log(workdir)
        assert max(record["step"] for record in curve(workdir)) <= 5
        assert not (workdir / "output").exists()
        kept = sorted((workdir / "checkpoints").glob("step-*"))
        assert [path.name for path in kept] == ["step-0000000002", "step-0000000003"]
        for path in kept:
            for tensor in (*load_file(str(path / "adapter.safetensors")).values(), *load_file(str(path / "state.safetensors")).values()):
                assert not tensor.is_floating_point() or bool(tensor.isfinite().all())
