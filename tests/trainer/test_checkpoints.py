"""The checkpoint store: whole or absent, damage noticed, the previous one used, state kept bit by bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoints import MANIFEST, CheckpointStore
from trainer.state_tree import join_tensors, split_tensors

KEY = "a" * 64


def write(directory: Path) -> None:
    (directory / "weights.safetensors").write_bytes(os.urandom(4096))
    (directory / "state.json").write_text('{"step": 1}')


def store(root: Path, *, key: str = KEY, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(root, key=key, keep=keep)


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
    before = (newest.path / name).read_bytes()
    damage(newest.path / name)
    if name == MANIFEST and damage is flip and _same_meaning(before, (newest.path / name).read_bytes()):
        pytest.skip("the flipped bit lies in white space")
    found, skipped = store(tmp_path).newest()
    assert found is not None
    assert found.step == 5
    assert len(skipped) == 1
    assert "step-0000000010" in skipped[0]


def _same_meaning(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def test_an_added_file_or_another_key_is_refused(tmp_path: Path) -> None:
    checkpoints = store(tmp_path)
    checkpoints.save(5, write)
    assert store(tmp_path, key="b" * 64).newest()[0] is None
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


WRITER = """
import os, sys
from pathlib import Path
from trainer.checkpoints import CheckpointStore
store, step = CheckpointStore(Path(sys.argv[1]), key="a" * 64, keep=2), 0
while True:
    step += 1
    store.save(step, lambda d: [(d / f"f{i}").write_bytes(os.urandom(200_000)) for i in range(5)])
    print(step, flush=True)
"""


def test_kill_at_any_moment_of_a_save_leaves_a_usable_one(tmp_path: Path) -> None:
    for delay in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        time.sleep(delay * 0.004)
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        process.wait()
        process.stdout.close()
        found, skipped = store(tmp_path).newest()
        assert found is not None
        assert found.step >= acknowledged
        assert skipped == []
        assert not list(tmp_path.glob(".stage-*"))
        for path in tmp_path.iterdir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()


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
