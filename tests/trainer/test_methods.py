"""DoRA, rsLoRA, other ranks per module and 4-bit bases: trained, resumed, written as PEFT reads them, and named when they cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from merger import merge
from parampara.errors import InvalidData, Preempted
from parampara.execution import stop
from parampara.manifest import sha256_file
from parampara.progress import SilentProgress
from parampara.schemas.stages import DaptConfig, LoraParams, MergeConfig, MergeParams, SftConfig
from tests.trainer.runs import dapt_config, losses, sft_config
from trainer import chat, dapt, sft
from trainer.engine import load_tokenizer

ADAPTER = Path("output") / "adapter_model.safetensors"
EVERYTHING = {
    "use_dora": True,
    "use_rslora": True,
    "init_lora_weights": "orthogonal",
    "rank_pattern": {"layers.0.self_attn.q_proj": 8, "down_proj": 2},
    "alpha_pattern": {"v_proj": 16.0},
}


def adapted(config: Any, **lora: Any) -> Any:
    params = config.params.model_dump()
    params["lora"].update(lora)
    return type(config).model_validate({**config.model_dump(), "params": params})


class StopAt(SilentProgress):
    def __init__(self, step: int) -> None:
        self.stop_at = step

    def step(self, step: int, total: int, **metrics: float) -> None:
        if step == self.stop_at:
            stop.request()


def stopped_and_continued(config: SftConfig, workdir: Path) -> Any:
    with pytest.raises(Preempted):
        sft.run(config, workdir=workdir, progress=StopAt(3))
    stop.clear()
    return sft.run(config, workdir=workdir, progress=SilentProgress())


def loss_of(model: Any, config: SftConfig) -> float:
    """Mean negative log likelihood per answer token of the held-out rows, row by row."""
    total = tokens = 0.0
    for row in chat.build_rows(config, load_tokenizer(config.model)).validation:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        tokens += int((labels != -100).sum())
    return total / tokens


def test_dora_rslora_and_patterns_are_trained_read_back_by_peft_and_merged(base: Path, qa: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = adapted(sft_config(base, qa, max_steps=8), **EVERYTHING)
    result = sft.run(config, workdir=tmp_path, progress=SilentProgress())
    assert result.validation_loss_after < result.validation_loss_before - 0.1
    written = json.loads((result.output / "adapter_config.json").read_text())
    assert {key: written[key] for key in EVERYTHING} == EVERYTHING
    tensors = load_file(str(tmp_path / ADAPTER))
    layer = "base_model.model.model.layers.{}.{}.lora_{}"
    assert tensors[layer.format(0, "self_attn.q_proj", "A.weight")].shape == (8, 64)
    assert tensors[layer.format(1, "self_attn.q_proj", "A.weight")].shape == (4, 64)
    assert tensors[layer.format(1, "mlp.down_proj", "A.weight")].shape == (2, 128)
    assert tensors[layer.format(1, "mlp.down_proj", "magnitude_vector")].shape == (64,)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(base)), str(result.output)).eval()
    projection = model.base_model.model.model.layers[0].self_attn.v_proj
    assert projection.scaling["default"] == pytest.approx(16 / 4**0.5)
    assert loss_of(model, config) == pytest.approx(result.validation_loss_after, abs=1e-4)
    merging = MergeConfig(model=base, adapters=[result.output], params=MergeParams(dtype="float32"))
    merged = merge.run(merging, workdir=tmp_path / "merge", progress=SilentProgress())
    served: Any = AutoModelForCausalLM.from_pretrained(str(merged.output)).eval()
    row = torch.tensor([chat.build_rows(config, load_tokenizer(base)).validation[0].input_ids])
    with torch.no_grad():
        assert torch.allclose(served(row).logits, model(row).logits, atol=2e-5)
    assert loss_of(served, config) == pytest.approx(result.validation_loss_after, abs=1e-4)


def test_the_method_survives_a_stop_bit_by_bit(base: Path, qa: Path, tmp_path: Path) -> None:
    config = adapted(sft_config(base, qa, max_steps=6, load_in_4bit=True), **{**EVERYTHING, "init_lora_weights": True})
    sft.run(config, workdir=tmp_path / "whole", progress=SilentProgress())
    assert stopped_and_continued(config, tmp_path / "parts").resumed_from_step == 3
    assert sha256_file(tmp_path / "parts" / ADAPTER) == sha256_file(tmp_path / "whole" / ADAPTER)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_qlora_trains_on_nf4_and_says_so(base: Path, qa: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from trainer.methods import four_bit_base

    config = sft_config(base, qa, max_steps=8, load_in_4bit=True, gradient_checkpointing=True)
    result = sft.run(config, workdir=tmp_path, progress=SilentProgress())
    record = json.loads((result.output / "training.json").read_text())
    assert result.trained_in == record["trained_in"] == "nf4"
    assert result.dtype == "float32"
    assert {tensor.dtype for tensor in load_file(str(tmp_path / ADAPTER)).values()} == {torch.float32}
    quantized: Any = AutoModelForCausalLM.from_pretrained(str(base), quantization_config=four_bit_base(torch.float32), device_map="cpu")
    weight = quantized.model.layers[0].mlp.down_proj.weight
    assert (weight.quant_type, weight.compress_statistics, weight.dtype) == ("nf4", True, torch.uint8)
    assert loss_of(quantized, config) == pytest.approx(result.validation_loss_before, abs=1e-4)
    plain: Any = AutoModelForCausalLM.from_pretrained(str(base))
    assert loss_of(plain, config) != pytest.approx(result.validation_loss_before, abs=1e-3)
    # the merge goes onto the unquantized base: what was learnt is still there
    assert loss_of(PeftModel.from_pretrained(plain, str(result.output)).eval(), config) < result.validation_loss_before - 0.1


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"target_modules": ["q_proj", "nonsense"]},
            r"target_modules: no module .* in 'nonsense'; its linear layers .* are down_proj, gate",
        ),
        ({"target_modules": ["lm_head"]}, "target_modules: no module .* 'lm_head'"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 8}},
            r"rank_pattern: .* 'v_proj'; its layers adapted here are q_proj, e\.g",
        ),
        ({"alpha_pattern": {"layers.9.self_attn.q_proj": 8}}, "alpha_pattern: no module"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 8, "q_proj": 2}}, "rank_pattern: .* ends in .* and in 'q_proj'; keep one"),
    ],
)
def test_a_module_that_is_not_there_is_named_with_its_setting(base: Path, book: Path, tmp_path: Path, lora: Any, message: str) -> None:
    with pytest.raises(InvalidData, match=message) as caught:
        dapt.run(adapted(dapt_config(base, book), **lora), workdir=tmp_path, progress=SilentProgress())
    assert caught.value.param == f"params.lora.{list(lora)[-1]}"


@pytest.mark.parametrize(
    "lora", [{"init_lora_weights": "pissa"}, {"init_lora_weights": False}, {"init_lora_weights": "orthogonal", "r": 3}]
)
def test_starts_that_change_the_base_or_can_not_be_drawn_are_refused_in_the_recipe(lora: Any) -> None:
    with pytest.raises(ValidationError, match="init_lora_weights"):
        LoraParams.model_validate(lora, strict=True)


def test_a_start_that_peft_can_not_draw_for_four_bits_is_refused_in_the_recipe(base: Path, qa: Path) -> None:
    with pytest.raises(ValidationError, match=r"orthogonal does not work with train\.load_in_4bit"):
        adapted(sft_config(base, qa, load_in_4bit=True), init_lora_weights="orthogonal")


def test_an_adapter_made_as_before_is_described_as_before(base: Path, book: Path) -> None:
    """New settings change nothing for a recipe that does not name them."""
    plain = DaptConfig.model_validate(dapt_config(base, book).model_dump()).params.lora
    assert (plain.use_dora, plain.use_rslora, plain.init_lora_weights, plain.rank_pattern, plain.alpha_pattern) == (
        False,
        False,
        True,
        {},
        {},
    )
