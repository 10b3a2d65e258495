"""Curves in TensorBoard's own files, written by transformers' callback; nothing of the training changes for it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from parampara.errors import InvalidRequest
from parampara.manifest import sha256_file
from parampara.progress import SilentProgress
from parampara.schemas.stages import Tracking
from tests.trainer.runs import losses, sft_config
from trainer import sft, tracking


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``prepare`` sets stays in the stage's process; here it must not reach the next test."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("TENSORBOARD_", "WANDB_", "MLFLOW_")):
            monkeypatch.delenv(name)
    yield
    for name in set(os.environ) - set(before):
        del os.environ[name]


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Tag to step to value, from the event files below ``folder``: records of length (8 bytes), its checksum (4), data, checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            length = struct.unpack("<Q", data[:8])[0]
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
            data = data[16 + length :]
    return found


def test_tensorboard_holds_the_runs_own_curve(base: Path, qa: Path, tmp_path: Path) -> None:
    config = sft_config(base, qa, max_steps=5, eval_steps=2)
    plain = sft.run(config, workdir=tmp_path / "plain", progress=SilentProgress())
    update = {"tracking": Tracking(report_to=["tensorboard"]), "tracking_directory": tmp_path / "tracking"}
    tracked = sft.run(config.model_copy(update=update), workdir=tmp_path / "job_1", progress=SilentProgress())
    curves = scalars(tmp_path / "tracking" / "tensorboard" / "sft-job_1")
    own = losses(tmp_path / "job_1")
    assert curves["train/loss"] == pytest.approx(own, rel=1e-6)
    assert set(curves["train/tokens_per_s"]) == set(curves["train/peak_memory_bytes"]) == set(own)
    assert curves["eval/loss"][0] == pytest.approx(tracked.validation_loss_before, rel=1e-6)
    assert set(curves["eval/loss"]) == {0, 2, 4, 5}
    assert curves["eval/loss"][5] == pytest.approx(tracked.validation_loss_after, rel=1e-6)
    assert sha256_file(tracked.output / "adapter_model.safetensors") == sha256_file(plain.output / "adapter_model.safetensors")
    assert not (tmp_path / "plain" / "tracking").exists()


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(
    base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking._MODULES, "mlflow", ("a_library_that_nobody_installs",))
    config = sft_config(base, qa).model_copy(update={"tracking": Tracking(report_to=["mlflow"])})
    with pytest.raises(InvalidRequest, match=r"report_to names mlflow, .* pip install a_library_that_nobody_installs") as caught:
        sft.run(config, workdir=tmp_path, progress=SilentProgress())
    assert caught.value.param == "tracking.report_to"


def test_trackers_stay_off_the_network_unless_whoever_starts_the_worker_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library itself is no part of the question and need not be here."""
    monkeypatch.setattr(tracking, "_MODULES", {"wandb": ("json",), "mlflow": ("json",)})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    tracking.prepare(Tracking(report_to=["wandb", "mlflow"], project="kp"), directory=tmp_path, run="dapt-job_1")
    assert (os.environ["WANDB_MODE"], os.environ["WANDB_DIR"]) == ("offline", str(tmp_path / "wandb"))
    assert (os.environ["WANDB_RUN_ID"], os.environ["WANDB_PROJECT"], os.environ["MLFLOW_EXPERIMENT_NAME"]) == ("dapt-job_1", "kp", "kp")
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://mlflow.example:5000"
