"""Out of memory at a step: smaller micro-batches, the same rows and loss, told in the result; at one document a named error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from parampara.errors import OutOfMemory, Preempted
from parampara.execution import stop
from parampara.schemas.stages import DaptConfig, MicroBatchReduction, SftConfig, TrainParams
from tests.trainer.runs import dapt_config, losses, sft_config
from tests.trainer.test_training import Recorder, adapter_sha, run
from trainer.faults import is_out_of_memory
from trainer.layout import documents_in
from trainer.memory import out_of_memory


class SmallMemory:
    """Runs out after the backward pass of more than ``documents`` at once: its gradients are added by then, as they may be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, documents: int, from_step: int = 1) -> None:
        self.raised = 0
        original = transformers.Trainer.training_step

        def training_step(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(trainer, model, inputs, *args, **kwargs)
            if documents_in(inputs) > documents and trainer.state.global_step + 1 >= from_step:
                self.raised += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss

        monkeypatch.setattr(transformers.Trainer, "training_step", training_step)


@pytest.fixture(autouse=True)
def _nobody_asks_to_stop() -> Iterator[None]:
    yield
    stop.clear()


def without_dropout(config: Any) -> Any:
    config.params.lora.lora_dropout = 0.0
    return config


@pytest.fixture(params=["dapt", "sft"])
def config(request: pytest.FixtureRequest, base: Path, book: Path, qa: Path) -> DaptConfig | SftConfig:
    batches = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5, "checkpoint_steps": 2}
    made = dapt_config(base, book, **batches) if request.param == "dapt" else sft_config(base, qa, **batches)
    return without_dropout(made)


def test_promise_12_out_of_memory_keeps_rows_and_loss_of_every_step(
    config: DaptConfig | SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 3 on one document fits where there were several, and the steps in which it shows are trained once, not twice."""
    straight = run(config, tmp_path / "straight")
    memory = SmallMemory(monkeypatch, documents=1, from_step=3)
    progress = Recorder()
    reduced = run(config, tmp_path / "reduced", progress)
    reductions = reduced.micro_batch_reductions
    assert memory.raised == len(reductions) >= 2
    assert reductions[0].step == 3
    assert all(2 * earlier.parts <= later.parts for earlier, later in pairwise([MicroBatchReduction(step=0, parts=1), *reductions]))
    assert straight.micro_batch_reductions == []
    written = json.loads((reduced.output / "training.json").read_text(encoding="utf-8"))
    assert written["micro_batch_reductions"] == [reduction.model_dump() for reduction in reductions]
    assert sum("out of memory at step" in event for event in progress.events) == memory.raised
    assert losses(tmp_path / "reduced") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)
    assert (reduced.trained_tokens, reduced.steps) == (straight.trained_tokens, straight.steps)
    tensors = [load_file(str(result.output / "adapter_model.safetensors")) for result in (straight, reduced)]
    assert all(torch.allclose(tensors[0][name], tensors[1][name], atol=1e-4) for name in tensors[0])


def test_a_reduced_run_goes_on_reduced_and_bit_by_bit(base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout: the micro-batches, and the random numbers that they draw, are those of the uninterrupted run."""
    config = sft_config(base, qa, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6)
    memory = SmallMemory(monkeypatch, documents=2, from_step=2)
    whole = run(config, tmp_path / "whole")
    raised, memory.raised = memory.raised, 0
    with pytest.raises(Preempted):
        run(config, tmp_path / "parts", Recorder(stop_at=4))
    stop.clear()
    result = run(config, tmp_path / "parts")
    assert memory.raised == raised > 0  # nothing was learnt again
    assert result.micro_batch_reductions == whole.micro_batch_reductions
    assert adapter_sha(tmp_path / "parts") == adapter_sha(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_at_one_document_the_error_says_what_would_help(base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SmallMemory(monkeypatch, documents=0, from_step=2)
    with pytest.raises(OutOfMemory, match=r"step 2 with a micro-batch of one document.*gradient_checkpointing.*max_seq_length.*QLoRA"):
        run(sft_config(base, qa, checkpoint_steps=1), tmp_path)
    assert not (tmp_path / "output").exists()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000000001"]


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    told = out_of_memory(TrainParams(gradient_checkpointing=True), caught.value)
    assert "gradient_checkpointing" not in told.message
    assert told.param == "params.train.max_tokens_per_batch"
