"""Operations per token counted on real models, peaks by device name, and what a stage reports of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from parampara.progress import SilentProgress
from parampara.schemas.stages import Machine
from tests.trainer.runs import sft_config
from trainer import sft
from trainer.methods import four_bit_base
from trainer.speed import Speedometer, flops_per_token, peak_flops


def model_of(base: Path, **given: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(base), **given)


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))


def counted(model: Any, *, length: int) -> float:
    """Operations per token of one forward and backward pass as PyTorch dispatches them."""
    tokens = torch.randint(5, 500, (1, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return counter.get_total_flops() / length


def test_operations_are_those_that_pytorch_counts_but_for_attention(base: Path) -> None:
    plain = model_of(base, attn_implementation="eager")
    assert flops_per_token(plain) < counted(plain, length=4) < flops_per_token(plain) * 1.02
    lora = adapted(model_of(base, attn_implementation="eager"))
    # nothing asks for the gradient of the first layer's input, which 4 N counts
    assert flops_per_token(lora) * 0.85 < counted(lora, length=4) < flops_per_token(lora) * 1.02
    assert flops_per_token(lora) < flops_per_token(plain) * 0.75


def test_a_base_in_four_bits_computes_as_much_as_one_in_sixteen(base: Path) -> None:
    quantized = model_of(base, quantization_config=four_bit_base(torch.float32), device_map="cpu")
    assert flops_per_token(adapted(quantized)) == flops_per_token(adapted(model_of(base)))


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA RTX A6000", 150),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125),
        ("Some new device", None),
    ],
)
def test_peaks_are_found_by_the_name_that_pytorch_tells(name: str, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_what_is_not_known_is_absent() -> None:
    read = Speedometer(torch.device("cpu"), flops_per_token=10, peak_flops=None, price_per_hour=None).read
    assert set(read(tokens_per_second=5, seconds=2)) == {"peak_memory_bytes"}


def test_a_stage_reports_memory_utilisation_and_cost(base: Path, qa: Path, tmp_path: Path) -> None:
    machine = Machine(peak_flops=1e9, price_per_hour=3600)
    config = sft_config(base, qa, max_steps=3).model_copy(update={"machine": machine})
    result = sft.run(config, workdir=tmp_path, progress=SilentProgress())
    assert result.mfu == pytest.approx(result.tokens_per_second * result.flops_per_token / 1e9)
    assert result.cost == pytest.approx(result.seconds)
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "loss" in step]
    assert [step["mfu"] for step in steps] == pytest.approx([step["tokens_per_s"] * result.flops_per_token / 1e9 for step in steps])
    assert 0 < steps[0]["cost"] < steps[-1]["cost"] == pytest.approx(result.cost)
    assert steps[-1]["peak_memory_bytes"] > 100_000
    assert json.loads((result.output / "training.json").read_text())["mfu"] == result.mfu
