"""The checkpoint store: whole or absent, damage noticed, the previous one used, state kept bit by bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoints import MANIFEST, CheckpointStore
from trainer.state_tree import join_tensors, split_tensors

FACTS = {"settings": {"seed": 1}, "versions": {"torch": "2"}}


def write(directory: Path) -> None:
    (directory / "weights.safetensors").write_bytes(os.urandom(4096))
    (directory / "state.json").write_text('{"step": 1}')


def store(root: Path, *, facts: Any = FACTS, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(root, facts=facts, keep=keep)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", MANIFEST])
@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, zero], ids=["missing", "truncated", "bit", "zeroed"])
def test_any_damage_is_noticed_and_the_previous_one_used(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(5, write)
    newest = checkpoints.save(10, write)
    damage(newest.path / name)
    found, skipped = store(tmp_path).newest()
    assert found is not None
    assert found.step == 5
    assert len(skipped) == 1
    assert "step-0000000010" in skipped[0]


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    manifest = checkpoints.save(5, write).path / MANIFEST
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        manifest.write_bytes(whole[:position] + bytes([whole[position] ^ (1 << position % 8)]) + whole[position + 1 :])
        assert checkpoints.newest()[0] is None, position
    manifest.write_bytes(whole)
    assert checkpoints.newest()[0] is not None


def test_an_added_file_or_other_facts_are_refused(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(5, write)
    found, skipped = store(tmp_path, facts={**FACTS, "versions": {"torch": "3"}}).newest()
    assert found is None
    assert "(versions.torch)" in skipped[0]
    (tmp_path / "step-0000000005" / "extra").write_text("x")
    assert store(tmp_path).newest()[0] is None


def test_rotation_counts_usable_ones_only(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000002", "step-0000000003"]
    flip(tmp_path / "step-0000000003" / "weights.safetensors")
    checkpoints.save(4, write)
    found, _ = checkpoints.newest()
    assert found is not None
    assert found.step == 4
    assert (tmp_path / "step-0000000002").is_dir()  # the second usable one


def test_a_failed_save_leaves_the_last_one_and_no_trace(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(5, write)

    def full(directory: Path) -> None:
        write(directory)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(6, full)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000005"]


def test_the_best_one_outlives_the_rotation(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    for step in range(1, 7):
        checkpoints.save(step, write, best=2 if step < 5 else 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:010d}" for step in (4, 5, 6)]
    assert checkpoints.at(4) is not None
    flip(tmp_path / "step-0000000004" / "state.json")
    assert checkpoints.at(4) is None


def test_a_usable_checkpoint_is_never_put_aside_for_another_of_its_step(tmp_path: Path) -> None:
    """Found by the kills below: with one checkpoint only, to replace it meant a moment with none."""
    checkpoints = store(tmp_path)
    before = (checkpoints.save(5, write).path / "weights.safetensors").read_bytes()
    after = checkpoints.save(5, write)
    assert (after.path / "weights.safetensors").read_bytes() == before
    flip(after.path / "weights.safetensors")
    checkpoints.save(5, write)
    assert checkpoints.newest()[1] == []


def _save_until_killed(root: Path, acknowledged: int, chance: random.Random) -> None:
    """Save steps, some of them again as a preempted run does, and tell each through the pipe; dies ``seconds`` after its first."""
    checkpoints, step = store(root), 0
    while True:
        step += 0 if step and chance.random() < 0.3 else 1
        checkpoints.save(step, lambda d: [(d / f"f{i}").write_bytes(os.urandom(chance.randint(1, 60_000))) for i in range(4)] and None)
        os.write(acknowledged, step.to_bytes(4, "little"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_promise_8_kill_at_any_moment_of_a_save_leaves_a_usable_one(tmp_path: Path) -> None:
    """Each round a forked process saves in a loop and is killed after a random time; ``PARAMPARA_SAVE_KILLS=500`` for a release."""
    chance = random.Random(8)
    for number in range(int(os.environ.get("PARAMPARA_SAVE_KILLS", "60"))):
        root = tmp_path / str(number)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                _save_until_killed(root, writer, chance)
            finally:
                os._exit(1)
        os.close(writer)
        first = int.from_bytes(os.read(reader, 4), "little")
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        with os.fdopen(reader, "rb") as pipe:
            told = pipe.read()
        acknowledged = int.from_bytes(told[-4:], "little") if told else first
        found, skipped = store(root).newest()
        assert found is not None
        assert found.step >= acknowledged
        assert skipped == []
        assert not list(root.glob(".stage-*"))
        shutil.rmtree(root)


def test_state_survives_json_and_safetensors_bit_by_bit(tmp_path: Path) -> None:
    state = {
        "state": {
            0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor([1e-45, -0.0, 3.3])},
            1: {"q": torch.tensor([1, 255], dtype=torch.uint8)},
        },
        "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None}],
        "rng": (3, (1, 2**32 - 1), None),
        "raw": b"\x00\xff",
    }
    tree, tensors = split_tensors(state)
    save_file(tensors, str(tmp_path / "t.safetensors"))
    back = join_tensors(json.loads(json.dumps(tree)), load_file(str(tmp_path / "t.safetensors")))
    assert back["param_groups"] == state["param_groups"]
    assert (back["rng"], back["raw"]) == (state["rng"], state["raw"])
    assert isinstance(back["param_groups"][0]["betas"], tuple)
    for index, tensors_of in state["state"].items():
        for name, tensor in tensors_of.items():
            assert back["state"][index][name].dtype == tensor.dtype
            assert back["state"][index][name].shape == tensor.shape
            assert back["state"][index][name].numpy().tobytes() == tensor.numpy().tobytes()
    with pytest.raises(TypeError, match="can not hold a object"):
        split_tensors({"x": object()})
