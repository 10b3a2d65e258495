"""Both stages on a tiny Llama in this process: they learn, stop, go on bit by bit, and keep nothing of a diverged run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from parampara.errors import Diverged, InvalidData, Preempted
from parampara.execution import stop
from parampara.manifest import sha256_file, weights_fingerprint
from parampara.progress import SilentProgress
from parampara.schemas.stages import DaptConfig, SftConfig, TextData, TrainResult
from tests.tiny_models import make_model
from tests.trainer.runs import dapt_config, losses, sft_config
from trainer import dapt, sft


class Recorder(SilentProgress):
    """Keeps what a stage reports; asks it to stop when it reports ``stop_at``."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.events: list[str] = []
        self.steps: list[tuple[int, int, dict[str, float]]] = []

    def event(self, message: str, *, level: Any = "info", **data: Any) -> None:
        self.events.append(message)

    def step(self, step: int, total: int, **metrics: float) -> None:
        self.steps.append((step, total, metrics))
        if step == self.stop_at:
            stop.request()


@pytest.fixture(autouse=True)
def _nobody_asks_to_stop() -> Iterator[None]:
    yield
    stop.clear()


@pytest.fixture(params=["dapt", "sft"])
def config(request: pytest.FixtureRequest, base: Path, book: Path, qa: Path) -> DaptConfig | SftConfig:
    return dapt_config(base, book) if request.param == "dapt" else sft_config(base, qa)


def run(config: DaptConfig | SftConfig, workdir: Path, progress: Any = None) -> TrainResult:
    progress = progress or SilentProgress()
    if isinstance(config, DaptConfig):
        return dapt.run(config, workdir=workdir, progress=progress)
    return sft.run(config, workdir=workdir, progress=progress)


def preempted(config: DaptConfig | SftConfig, workdir: Path, *, at: int) -> None:
    with pytest.raises(Preempted):
        run(config, workdir, Recorder(stop_at=at))
    stop.clear()
    assert not (workdir / "output").exists()


def adapter_sha(workdir: Path) -> str:
    return sha256_file(workdir / "output" / "adapter_model.safetensors")


def test_a_stage_learns_and_says_what_it_did(config: DaptConfig | SftConfig, base: Path, tmp_path: Path) -> None:
    progress = Recorder()
    result = run(config, tmp_path, progress)
    assert result.validation_loss_after < result.validation_loss_before - 0.5
    assert result.train_loss_last < result.train_loss_first
    assert result.perplexity_after == pytest.approx(math.exp(result.validation_loss_after))
    assert (result.backend, result.dtype, result.optimizer) == ("trl", "float32", "adamw_torch")
    assert result.base_sha256 == weights_fingerprint(base)
    assert result.packing_efficiency == 1.0
    step, total, metrics = progress.steps[-1]
    assert step == total == result.steps
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "eta_s", "epoch"} <= set(metrics)
    assert metrics["tokens"] == result.trained_tokens
    assert len(losses(tmp_path)) == result.steps
    output = {path.name for path in result.output.iterdir()}
    assert output >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "training.json",
        "metrics.jsonl",
    }
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for path in tmp_path.rglob("*") if (name := path.name))
    described = (result.output / "adapter_config.json").read_text() + (result.output / "training.json").read_text()
    assert str(tmp_path) not in described
    assert str(base) not in described


def test_validation_loss_is_that_of_the_saved_adapter(config: DaptConfig | SftConfig, base: Path, tmp_path: Path) -> None:
    """Computed again row by row with PEFT's own loading of what was written."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trainer import blocks, chat
    from trainer.engine import load_tokenizer

    result = run(config, tmp_path)
    tokenizer = load_tokenizer(base)
    data = blocks.build_rows(config, tokenizer) if isinstance(config, DaptConfig) else chat.build_rows(config, tokenizer)
    plain: Any = AutoModelForCausalLM.from_pretrained(str(base))
    for adapted, expected in ((False, result.validation_loss_before), (True, result.validation_loss_after)):
        model: Any = PeftModel.from_pretrained(plain, str(result.output)) if adapted else plain
        total = tokens = 0.0
        for row in data.validation:
            with torch.no_grad():
                logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
            labels = torch.tensor(row.labels[1:])
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
            tokens += int((labels != -100).sum())
        assert total / tokens == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("at", [1, 4])
def test_stopped_and_continued_equals_uninterrupted(config: DaptConfig | SftConfig, tmp_path: Path, at: int) -> None:
    whole = run(config, tmp_path / "whole")
    preempted(config, tmp_path / "parts", at=at)
    preempted(config, tmp_path / "parts", at=at + 3)
    progress = Recorder()
    result = run(config, tmp_path / "parts", progress)
    assert result.resumed_from_step == at + 3
    assert any(f"step {at + 3}" in event for event in progress.events)
    assert adapter_sha(tmp_path / "parts") == adapter_sha(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for field in ("validation_loss_before", "validation_loss_after", "trained_tokens", "train_loss_first", "train_loss_last", "steps"):
        assert getattr(result, field) == getattr(whole, field), field


def test_a_stop_within_a_step_repeats_that_step_exactly(base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop after the first of four micro-batches: the half step leaves no trace in weights, counters or randomness."""
    from trainer import loop

    # a budget below any row: each of a step's four rows is a micro-batch
    config = sft_config(base, qa, per_device_train_batch_size=1, gradient_accumulation_steps=4, max_tokens_per_batch=16)
    run(config, tmp_path / "whole")
    calls = 0
    original = loop.StageLoop.micro_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        result = original(self, *args, **kwargs)
        calls += 1
        if calls == 4 * 4 + 1:
            stop.request()
        return result

    monkeypatch.setattr(loop.StageLoop, "micro_step", counted)
    with pytest.raises(Preempted, match="step 4 of"):
        run(config, tmp_path / "parts")
    stop.clear()
    assert run(config, tmp_path / "parts").resumed_from_step == 4
    assert adapter_sha(tmp_path / "parts") == adapter_sha(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(base: Path, qa: Path, tmp_path: Path) -> None:
    config = sft_config(base, qa)
    run(config, tmp_path / "whole")
    preempted(config, tmp_path / "parts", at=8)
    newest = tmp_path / "parts" / "checkpoints" / "step-0000000008" / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-5] ^= 4
    newest.write_bytes(bytes(data))
    progress = Recorder()
    assert run(config, tmp_path / "parts", progress).resumed_from_step == 6
    assert any("passed over: step-0000000008: state.safetensors" in event for event in progress.events)
    assert adapter_sha(tmp_path / "parts") == adapter_sha(tmp_path / "whole")


def test_another_configuration_or_data_does_not_resume(base: Path, book: Path, tmp_path: Path) -> None:
    preempted(dapt_config(base, book), tmp_path, at=4)
    progress = Recorder()
    assert run(dapt_config(base, book, learning_rate=1e-3), tmp_path, progress).resumed_from_step == 0
    assert any("another configuration" in event for event in progress.events)


def test_moved_data_and_retention_do_resume(base: Path, book: Path, tmp_path: Path) -> None:
    """Where files lie and how many checkpoints are kept changes nothing of what is computed."""
    preempted(dapt_config(base, book), tmp_path / "work", at=4)
    moved = tmp_path / "moved.txt"
    moved.write_bytes(book.read_bytes())
    assert run(dapt_config(base, moved, keep_checkpoints=3), tmp_path / "work").resumed_from_step == 4


def test_a_finished_run_that_lost_its_output_is_finished_again(base: Path, book: Path, tmp_path: Path) -> None:
    import shutil

    config = dapt_config(base, book)
    result = run(config, tmp_path)
    before = adapter_sha(tmp_path)
    shutil.rmtree(tmp_path / "output")
    again = run(config, tmp_path)
    assert again.resumed_from_step == result.steps
    assert adapter_sha(tmp_path) == before
    assert again.validation_loss_after == result.validation_loss_after


def test_stop_before_the_first_step_is_preempted_without_checkpoint(base: Path, book: Path, tmp_path: Path) -> None:
    stop.request()
    with pytest.raises(Preempted):
        run(dapt_config(base, book), tmp_path)
    assert list((tmp_path / "checkpoints").iterdir() if (tmp_path / "checkpoints").exists() else []) == []


def poisoned_base(directory: Path, token: str) -> Path:
    """A base in which one token's embedding is NaN: a run diverges at the step that first sees it."""
    base = make_model(directory)
    path = base / "model.safetensors"
    tensors = load_file(str(path))
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    tensors["model.embed_tokens.weight"][tokenizer(token, add_special_tokens=False)["input_ids"]] = float("nan")
    save_file(tensors, str(path), metadata={"format": "pt"})
    return base


def test_divergence_stops_at_once_and_keeps_nothing_of_it(book: Path, tmp_path: Path) -> None:
    base = poisoned_base(tmp_path / "base", "~")
    text = tmp_path / "book.txt"
    text.write_text(book.read_text() + "\n\nA tilde ~ here.\n", encoding="utf-8")
    clean = tmp_path / "held.txt"
    clean.write_text("The lord of house 2 is Venus.", encoding="utf-8")
    config = dapt_config(base, text, checkpoint_steps=1, epochs=1)
    config = config.model_copy(update={"data": TextData(train=[text], validation=[clean])})
    progress = Recorder()
    with pytest.raises(Diverged, match=r"Step \d+: the loss is nan"):
        run(config, tmp_path / "work", progress)
    assert not (tmp_path / "work" / "output").exists()
    assert all(math.isfinite(metrics["loss"]) for _, _, metrics in progress.steps)
    for path in (tmp_path / "work" / "checkpoints").glob("*/adapter.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(str(path)).values())


def test_a_base_that_is_not_finite_diverges_before_training(base: Path, book: Path, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="validation loss"):
        run(dapt_config(poisoned_base(tmp_path / "base", " lord"), book), tmp_path / "work")


def test_evaluation_while_training_changes_nothing(base: Path, qa: Path, tmp_path: Path) -> None:
    run(sft_config(base, qa), tmp_path / "without")
    run(sft_config(base, qa, eval_steps=4), tmp_path / "with")
    assert adapter_sha(tmp_path / "without") == adapter_sha(tmp_path / "with")
    records = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "validation_loss" in record][:3] == [0, 4, 8]


def test_a_stop_during_evaluation_keeps_the_steps_before_it(base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to stop while step 8 is evaluated, far from the next checkpoint: nothing is trained again, and the evaluation is made up for."""
    from trainer import validation

    config = sft_config(base, qa, eval_steps=4, checkpoint_steps=100)
    run(config, tmp_path / "whole")
    batches, original = 0, validation._batches

    def counted(rows: Any) -> Iterator[Any]:
        nonlocal batches
        for batch in original(rows):
            batches += 1
            if batches == 3:  # before training, at step 4, at step 8: the rows make one batch
                stop.request()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(validation, "_batches", counted)
        with pytest.raises(Preempted, match="step 8 of"):
            run(config, tmp_path / "parts")
    stop.clear()
    assert batches == 3
    assert run(config, tmp_path / "parts").resumed_from_step == 8
    assert adapter_sha(tmp_path / "parts") == adapter_sha(tmp_path / "whole")
    whole, parts = (validations(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts
    assert 8 in whole


def validations(workdir: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["validation_loss"] for record in records if "validation_loss" in record}


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"])
def test_optimizers_of_bitsandbytes_run_and_resume_exactly_on_a_cpu_too(base: Path, book: Path, tmp_path: Path, optim: str) -> None:
    config = dapt_config(base, book, optim=optim, epochs=1)
    whole = run(config, tmp_path / "whole")
    assert whole.optimizer == optim
    assert whole.validation_loss_after < whole.validation_loss_before
    preempted(config, tmp_path / "parts", at=2)
    assert run(config, tmp_path / "parts").resumed_from_step == 2
    assert adapter_sha(tmp_path / "parts") == adapter_sha(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_modules_that_the_base_lacks_are_refused(base: Path, book: Path, tmp_path: Path) -> None:
    config = dapt_config(base, book)
    lora = config.params.lora.model_copy(update={"target_modules": ["no_such_proj"]})
    config = config.model_copy(update={"params": config.params.model_copy(update={"lora": lora})})
    with pytest.raises(InvalidData, match="no_such_proj"):
        run(config, tmp_path)


def test_sft_copies_the_line_of_a_merged_base(base: Path, qa: Path, tmp_path: Path) -> None:
    import shutil

    merged = shutil.copytree(base, tmp_path / "merged")
    record = {"base_sha256": "b" * 64, "adapters": ["a" * 64], "weights_sha256": weights_fingerprint(merged), "dtype": "float32"}
    (merged / "merge.json").write_text(json.dumps(record))
    result = run(sft_config(merged, qa, max_steps=1), tmp_path / "work")
    trained = json.loads((result.output / "training.json").read_text())
    assert trained["lineage"] == {"base_sha256": "b" * 64, "adapters": ["a" * 64]}
    (merged / "merge.json").write_text(json.dumps({**record, "weights_sha256": "0" * 64}))
    with pytest.raises(InvalidData, match="other weights"):
        run(sft_config(merged, qa, max_steps=1), tmp_path / "again")


def test_gradient_checkpointing_gives_the_same_losses(base: Path, qa: Path, tmp_path: Path) -> None:
    run(sft_config(base, qa, max_steps=4), tmp_path / "off")
    run(sft_config(base, qa, max_steps=4, gradient_checkpointing=True), tmp_path / "on")
    assert losses(tmp_path / "on") == pytest.approx(losses(tmp_path / "off"), abs=1e-5)


def test_nothing_is_written_outside_the_workdir(base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run(sft_config(base, qa, max_steps=2), tmp_path / "work")
    assert os.listdir() == []


def test_the_adapter_may_be_that_of_the_best_step(base: Path, qa: Path, tmp_path: Path) -> None:
    """At a learning rate at which validation gets worse again; the best checkpoint outlives the newer ones and is what is written."""
    settings: dict[str, Any] = {
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "eval_steps": 1,
        "max_steps": 8,
        "checkpoint_steps": 1,
    }
    last = run(sft_config(base, qa, **settings), tmp_path / "last")
    best = run(sft_config(base, qa, load_best=True, **settings), tmp_path / "best")
    curve = {**validations(tmp_path / "last"), last.steps: last.validation_loss_after}
    lowest = min(list(curve)[1:], key=lambda step: curve[step])
    assert 0 < lowest < last.steps - 1  # else this test shows nothing
    assert (last.best_step, last.best_validation_loss, last.adapter_step) == (lowest, curve[lowest], last.steps)
    assert (best.best_step, best.adapter_step, best.validation_loss_after) == (lowest, lowest, curve[lowest])
    kept = sorted(int(path.name.rpartition("-")[2]) for path in (tmp_path / "best" / "checkpoints").iterdir())
    assert kept == [lowest, last.steps - 1, last.steps]
    checkpoint = load_file(str(tmp_path / "best" / "checkpoints" / f"step-{lowest:010d}" / "adapter.safetensors"))
    written = load_file(str(best.output / "adapter_model.safetensors"))
    assert {name.replace(".default.", "."): tensor.sum() for name, tensor in checkpoint.items()} == {
        name: tensor.sum() for name, tensor in written.items()
    }


def test_a_model_that_only_knows_the_mean_of_a_micro_batch_learns_the_same(
    base: Path, qa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some multimodal models take no count of learnt tokens; their micro-batches are weighed from outside."""
    config = sft_config(base, qa, max_tokens_per_batch=48, max_steps=4)
    run(config, tmp_path / "counted")
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    run(config, tmp_path / "mean")
    assert losses(tmp_path / "mean") == pytest.approx(losses(tmp_path / "counted"), abs=1e-5)
