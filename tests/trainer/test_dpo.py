"""Stage dpo on a tiny Llama: it learns to prefer, its loss is TRL's own, and it stops, goes on and runs out of memory like the others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from parampara.errors import Diverged, InvalidData, Preempted
from parampara.execution import stop
from parampara.manifest import weights_fingerprint
from parampara.progress import SilentProgress
from parampara.schemas.stages import DpoConfig, DpoParams, Machine, TrainResult
from tests.trainer.runs import dpo_config, losses, start, write_preferences
from tests.trainer.test_training import Recorder
from trainer import dpo
from trainer.divergence import require_no_runaway
from trainer.engine import load_tokenizer
from trainer.preferences import PairLayout, build_rows, pairs_in

ADAPTER = Path("output") / "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _nobody_asks_to_stop() -> Iterator[None]:
    yield
    stop.clear()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_preferences(tmp_path_factory.mktemp("dpo") / "preferences.jsonl")


def run(config: DpoConfig, workdir: Path, progress: Any = None) -> TrainResult:
    return dpo.run(config, workdir=workdir, progress=progress or SilentProgress())


@pytest.fixture(scope="module")
def whole(base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(dpo_config(base, pairs), workdir)


def test_it_learns_to_prefer_and_says_so(base: Path, whole: tuple[Path, TrainResult]) -> None:
    workdir, result = whole
    assert result.validation_loss_before == pytest.approx(math.log(2), rel=1e-5)  # the model against itself
    assert result.validation_loss_after < 0.3
    assert result.reward_accuracy == 1.0
    assert result.reward_margin is not None
    assert result.reward_margin > 1
    assert (result.perplexity_before, result.perplexity_after, result.backend) == (None, None, "trl")
    assert result.base_sha256 == weights_fingerprint(base)
    history = [json.loads(line) for line in (workdir / "output" / "metrics.jsonl").read_text().splitlines()]
    curve = [row["reward_margin"] for row in history if "loss" in row]
    assert curve[-1] > curve[0] + 0.5
    assert {"reward_accuracy", "reward_margin", "validation_loss"} <= set(history[-1])
    record = json.loads((workdir / "output" / "training.json").read_text())
    assert (record["kind"], record["reward_accuracy"], record["params"]["beta"]) == ("dpo", 1.0, 0.1)
    names = load_file(str(workdir / ADAPTER))
    assert names
    assert not [name for name in names if ".ref." in name]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sigmoid_norm"])
def test_the_loss_of_a_step_is_trl_s_in_any_cut(base: Path, pairs: Path, tmp_path: Path, loss_type: str) -> None:
    """The first steps of a run in micro-batches of one pair, against TRL's trainer on whole batches in the same order."""
    small = dpo_config(base, pairs, loss_type=loss_type, max_tokens_per_batch=16, max_steps=3, warmup_ratio=0.0)
    run(small, tmp_path / "ours")
    expected = _by_trl(small, tmp_path)
    found = losses(tmp_path / "ours")
    assert [found[step] for step in (1, 2, 3)] == pytest.approx(expected, rel=2e-4, abs=2e-5)


def _by_trl(config: DpoConfig, tmp_path: Path) -> list[float]:
    """TRL as its users write it: a PEFT configuration, a data set of token ids, its own collator, one batch a step."""
    from datasets import Dataset
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from trainer.methods import adapter_arguments
    from trainer.plan import plan_batches

    tokenizer = load_tokenizer(config.model)
    data = build_rows(config, tokenizer)
    train = config.params.train
    layout = PairLayout("padded", "", 16, tokenizer.pad_token_id or 0)
    parts = [row.parts for row in data.train]
    plan = plan_batches(
        len(parts),
        per_step=4,
        epochs=train.epochs,
        max_steps=3,
        seed=config.seed,
        cost=lambda rows: layout.cost([length for row in rows for length in parts[row]]),
    )
    rows = []
    for index in (index for batch in plan for index in batch):
        chosen, rejected = data.train[index].split()
        asked = sum(label == -100 for label in chosen.labels)
        rows.append(
            {
                "prompt_ids": chosen.input_ids[:asked],
                "chosen_ids": chosen.input_ids[asked:],
                "rejected_ids": rejected.input_ids[asked:],
            }
        )

    class Ordered(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

    arguments = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        loss_type=[config.params.loss_type],
        beta=config.params.beta,
        max_length=None,
        disable_dropout=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        optim="adamw_torch",
        seed=config.seed,
        disable_tqdm=True,
    )
    torch.manual_seed(config.seed)
    trainer = Ordered(
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(**adapter_arguments(config.params.lora), task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_stopped_and_continued_it_is_the_same_run(base: Path, pairs: Path, whole: tuple[Path, TrainResult], tmp_path: Path) -> None:
    config = dpo_config(base, pairs)
    with pytest.raises(Preempted):
        run(config, tmp_path, Recorder(stop_at=5))
    stop.clear()
    result = run(config, tmp_path)
    assert result.resumed_from_step == 5
    assert losses(tmp_path) == losses(whole[0])
    assert (tmp_path / ADAPTER).read_bytes() == (whole[0] / ADAPTER).read_bytes()
    assert (result.reward_accuracy, result.reward_margin) == (whole[1].reward_accuracy, whole[1].reward_margin)


def test_with_load_best_the_figures_are_those_of_the_best_step(base: Path, pairs: Path, tmp_path: Path) -> None:
    """A learning rate that overshoots: the adapter, its loss and its reward figures belong together."""
    result = run(dpo_config(base, pairs, eval_steps=2, load_best=True, learning_rate=0.2, max_steps=9), tmp_path)
    history = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row for row in history if "validation_loss" in row}
    assert result.adapter_step is not None
    kept = by_step[result.adapter_step]
    assert result.validation_loss_after == kept["validation_loss"] == min(row["validation_loss"] for row in by_step.values() if row["step"])
    assert (result.reward_accuracy, result.reward_margin) == pytest.approx((kept["reward_accuracy"], kept["reward_margin"]), rel=1e-5)


def test_out_of_memory_splits_pairs_and_keeps_the_losses(base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import DPOTrainer

    computed = DPOTrainer.compute_loss

    def small_memory(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if pairs_in(inputs) > 1 and (self.model.training or self.run.ledger.parts > 1):  # before the first step nothing is known yet
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return computed(self, model, inputs, *args, **kwargs)

    config = dpo_config(base, pairs, max_tokens_per_batch=1024, max_steps=4)
    assert not run(config, tmp_path / "large").micro_batch_reductions
    monkeypatch.setattr(DPOTrainer, "compute_loss", small_memory)
    result = run(config, tmp_path / "small")
    assert result.micro_batch_reductions
    assert list(losses(tmp_path / "small").values()) == pytest.approx(list(losses(tmp_path / "large").values()), rel=1e-3)


def test_a_micro_batch_holds_the_better_answers_first(base: Path, pairs: Path) -> None:
    config = dpo_config(base, pairs)
    tokenizer = load_tokenizer(base)
    rows = build_rows(config, tokenizer).train[:6]
    layout = PairLayout("padded", "", 400, 0)
    batches = layout.collate(rows)
    assert sum(pairs_in(batch) for batch in batches) == 6
    assert [batch["input_ids"].numel() for batch in batches] == layout.positions([length for row in rows for length in row.parts])
    texts = []
    for batch in batches:
        for ids, mask, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
            assert int((answer & ~mask.bool()).sum()) == 0
            texts.append(tokenizer.decode(ids[answer.bool()]))
        half = pairs_in(batch)
        assert all("Answer:" in text for text in texts[-2 * half : -half])
        assert all("It may be" in text for text in texts[-half:])


def test_a_pair_that_is_cut_before_its_answers_is_named(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"question": "why " * 200 + str(number), "chosen": "this", "rejected": "that"} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InvalidData, match=r"long.jsonl row \d: the conversation before the answers has \d+ tokens, and max_seq_length is 96"
    ):
        run(dpo_config(base, path), tmp_path / "work")
    rows = [{"question": f"q{number}?", "chosen": "so " * 300 + "a", "rejected": "so " * 300 + "b"} for number in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidData, match=r"long.jsonl row \d: the two answers do not differ within max_seq_length"):
        run(dpo_config(base, path), tmp_path / "work")


def test_smoothing_is_for_the_loss_that_has_it() -> None:
    with pytest.raises(ValueError, match="label_smoothing is for loss_type robust"):
        DpoParams(label_smoothing=0.1)
    assert DpoParams(label_smoothing=0.1, loss_type="robust").label_smoothing == 0.1


def test_it_trains_an_adapter_in_one_process(base: Path, pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage dpo trains an adapter"):
        DpoParams(lora=None)
    config = dpo_config(base, pairs, max_steps=2).model_copy(update={"machine": Machine(processes=2)})
    progress = Recorder()
    assert run(config, tmp_path, progress).processes == 1
    assert "one process trains, and not 2: stage dpo knows no other way" in progress.events


@pytest.mark.slow
def test_unsloth_gives_the_same_losses(base: Path, pairs: Path, tmp_path: Path) -> None:
    """In processes of their own: Unsloth rebinds the libraries of the one that it is imported into."""
    found = {}
    for backend in ("unsloth", "trl"):
        process = start(dpo_config(base, pairs, backend=backend, max_steps=6), tmp_path / backend)
        assert process.wait(timeout=240) == 0, (tmp_path / backend / "log").read_text(encoding="utf-8")[-3000:]
        assert json.loads((tmp_path / backend / "result.json").read_text())["backend"] == backend
        found[backend] = list(losses(tmp_path / backend).values())
    assert found["unsloth"] == pytest.approx(found["trl"], rel=1e-4)


def test_a_setting_of_ones_own_leaves_the_others_as_they_are() -> None:
    changed = DpoParams.model_validate({"train": {"epochs": 2}, "lora": {"r": 8}})
    assert changed.lora is not None
    assert (changed.train.learning_rate, changed.train.packing, changed.lora.lora_dropout) == (1e-5, False, 0.0)
    assert (changed.train.epochs, changed.lora.r) == (2, 8)
    assert DpoParams.model_validate({"train": {"learning_rate": 1e-4}}).train.learning_rate == 1e-4


def test_a_negative_loss_that_grows_better_is_no_runaway() -> None:
    """``robust`` lies below zero once pairs are told apart: three times that is no bound."""
    require_no_runaway([-0.1 - 0.002 * step for step in range(200)])
    require_no_runaway([0.0] * 100 + [0.2] * 60)
    with pytest.raises(Diverged):
        require_no_runaway([0.5] * 100 + [2.0] * 60)
