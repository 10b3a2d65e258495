"""Every value of the KP recipe arrives in the libraries' own objects; it is compared with the recipe's text, not with our schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from parampara.schemas.stages import DaptConfig, SftConfig
from tests.trainer.built import RECIPE, STEPS, configs, describe
from tests.trainer.runs import write_book
from trainer import blocks, chat
from trainer.building import training_arguments
from trainer.engine import load_tokenizer
from trainer.precision import choose_hardware

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def written(stage: str) -> dict[str, Any]:
    return yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["stages"][stage]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for several chunks of the recipe's length."""
    return write_book(tmp_path_factory.mktemp("books") / "book.txt", paragraphs=160)


@pytest.fixture(params=["dapt", "sft"])
def config(request: pytest.FixtureRequest, base: Path, library: Path, qa: Path) -> DaptConfig | SftConfig:
    return configs("trl", base, library, qa)[request.param]


def test_the_recipe_says_what_the_plan_said() -> None:
    """Rank 16, alpha 32, dropout 0.05, seven projections, 2e-4 cosine, fp16, checkpointing, paged AdamW, 4 x 4, 2048, 1 and 3 epochs."""
    for stage, epochs in (("dapt", 1), ("sft", 3)):
        lora, train = written(stage)["lora"], written(stage)["train"]
        assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"], set(lora["target_modules"])) == (16, 32, 0.05, SEVEN)
        assert (train["epochs"], train["per_device_train_batch_size"], train["gradient_accumulation_steps"]) == (epochs, 4, 4)
        assert (train["learning_rate"], train["lr_scheduler_type"], train["max_seq_length"]) == (2e-4, "cosine", 2048)
        assert (train["optim"], train["precision"], train["gradient_checkpointing"]) == ("paged_adamw_32bit", "float16", True)


def test_trl_and_peft_are_given_what_is_written(config: DaptConfig | SftConfig, tmp_path: Path) -> None:
    built = describe(config, tmp_path)
    check(built, written(config.kind))
    # AdamW with 32-bit state, paged: a CPU takes it too
    assert (built["optim"], built["optimizer"], built["paged_bits"]) == ("paged_adamw_32bit", ["bitsandbytes", "AdamW"], [True, 32])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_unsloth_is_given_what_is_written(base: Path, library: Path, qa: Path) -> None:
    command = [sys.executable, "-m", "tests.trainer.built", "unsloth", str(base), str(library), str(qa)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=RECIPE.parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    built = json.loads(done.stdout.splitlines()[-1])
    for kind in ("dapt", "sft"):
        assert built[kind]["backend"] == "unsloth"
        check(built[kind], written(kind))
        # on a CPU Unsloth takes PyTorch's AdamW in place of a paged one; that is what the stage's result then says
        assert (built[kind]["optim"], built[kind]["optimizer"]) == ("adamw_torch_fused", ["torch", "AdamW"])


def check(built: dict[str, Any], recipe: dict[str, Any]) -> None:
    lora, train = recipe["lora"], recipe["train"]
    assert built["r"] == [lora["r"]]
    assert built["lora_alpha"] == lora["lora_alpha"]
    assert built["scaling"] == [lora["lora_alpha"] / lora["r"]]
    assert built["dropout"] == [lora["lora_dropout"]]
    assert set(built["projections"]) == set(lora["target_modules"])
    assert built["layers"] == 7
    assert (built["trained"], built["frozen"]) == (["torch.float32"], ["torch.float32"])
    assert built["per_device_train_batch_size"] == train["per_device_train_batch_size"]
    assert built["rows_of_a_step"] == [train["per_device_train_batch_size"] * train["gradient_accumulation_steps"]]
    assert built["layout"] == "flat"
    assert built["gradient_checkpointing"] is train["gradient_checkpointing"]
    assert built["weight_decay"] == 0
    rates, warmup = built["rates"], round(train["warmup_ratio"] * STEPS)
    assert len(rates) == built["steps"] == STEPS
    assert max(rates) == rates[warmup] == pytest.approx(train["learning_rate"])
    # a quarter, a half and three quarters down a cosine
    for share, level in ((0.25, 0.854), (0.5, 0.5), (0.75, 0.146)):
        assert rates[warmup + round(share * (STEPS - warmup))] == pytest.approx(train["learning_rate"] * level, rel=0.05)


def test_length_and_epochs_arrive_in_rows_and_order(config: DaptConfig | SftConfig) -> None:
    train = config.params.train
    assert train.max_seq_length == written(config.kind)["train"]["max_seq_length"]
    assert train.epochs == written(config.kind)["train"]["epochs"]
    short = train.model_copy(update={"max_seq_length": 240})
    tokenizer = load_tokenizer(config.model)
    for used in (config, config.model_copy(update={"params": config.params.model_copy(update={"train": short})})):
        data = blocks.build_rows(used, tokenizer) if isinstance(used, DaptConfig) else chat.build_rows(used, tokenizer)
        assert max(len(row.input_ids) for row in data.train) <= used.params.train.max_seq_length


def test_precision_follows_the_hardware(config: DaptConfig | SftConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is a part of the machine, which no test can bring; torch says here that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train = config.params.train
    hardware = choose_hardware(train.precision, train.optim)
    assert (hardware.device.type, hardware.dtype, hardware.optimizer) == ("cuda", "float16", "paged_adamw_32bit")
    arguments = training_arguments(config, hardware=hardware, steps=100, workdir=tmp_path)
    assert (arguments["fp16"], arguments["bf16"], arguments["use_cpu"]) == (True, False, False)
    for bf16, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda bf16=bf16: bf16)
        assert choose_hardware("auto", train.optim).dtype == expected
