"""The shipped recipes are valid, and the KP recipe holds the training plan's figures exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parampara.errors import InvalidRequest
from parampara.plain_yaml import read_yaml
from parampara.schemas.recipe import Recipe, load_recipe, parse_recipe
from parampara.schemas.stages import DpoParams, Gate, TrainParams

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
ALL_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture
def kp() -> Recipe:
    return load_recipe(ROOT / "recipes" / "kp-llama-3.1-8b.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_validates_and_is_named_after_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize("stage", ["dapt", "sft"])
def test_kp_lora_and_optimizer_are_the_plans(kp: Recipe, stage: str) -> None:
    params = getattr(kp.stages, stage)
    assert (params.lora.r, params.lora.lora_alpha, params.lora.lora_dropout) == (16, 32, 0.05)
    assert set(params.lora.target_modules) == ALL_PROJECTIONS
    assert not params.lora.use_rslora
    train = params.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (4, 4)
    assert train.learning_rate == 2e-4
    assert train.lr_scheduler_type == "cosine"
    assert train.max_seq_length == 2048
    assert train.optim == "paged_adamw_32bit"
    assert train.precision == "float16"
    assert train.gradient_checkpointing is True


def test_kp_stages_are_the_plans(kp: Recipe) -> None:
    assert kp.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert (kp.stages.dapt.train.epochs, kp.stages.sft.train.epochs) == (1, 3)
    assert kp.stages.merge.dtype == "float16"
    assert kp.stages.quantize.schemes == ["w8a8", "unsloth", "bitsandbytes"]
    deploy = kp.stages.deploy
    assert deploy is not None
    assert (deploy.alias, deploy.max_model_len, deploy.gpu_memory_utilization, deploy.dtype) == ("kp", 2048, 0.9, "float16")


def test_the_stage_and_the_gates_that_the_kp_recipe_only_mentions_are_valid_and_its_values_are_the_defaults() -> None:
    text = (ROOT / "recipes" / "kp-llama-3.1-8b.yaml").read_text(encoding="utf-8")
    block = text[text.index("  # dpo:\n") : text.index("  # Base + DAPT adapter")]
    stage = read_yaml(re.sub(r"^  # ", "", block, flags=re.MULTILINE), param="recipe")
    gates = read_yaml("\n".join(re.findall(r"^  # (- \{metric: (?:dpo|parity\.sft)\..*)$", text, flags=re.MULTILINE)), param="recipe")
    named = parse_recipe({"name": "r", "base_model": "b", "stages": stage, "gates": gates})
    assert named.stages.dpo == DpoParams()
    assert [gate.metric for gate in named.gates] == ["dpo.reward_accuracy", "dpo.exact_change", "parity.sft.recovered"]
    unnamed = {
        "train": TrainParams.model_fields.keys() - stage["dpo"]["train"].keys(),
        "": DpoParams.model_fields.keys() - stage["dpo"].keys(),
    }
    assert unnamed == {"train": set(), "": set()}, "every setting is explained"


def test_kp_gates_are_the_plans(kp: Recipe) -> None:
    gates = {gate.metric: gate for gate in kp.gates}
    assert gates["dapt.perplexity_reduction"].min == 0.30
    assert (gates["sft.validation_loss.after"].min, gates["sft.validation_loss.after"].max) == (1.2, 1.5)
    assert gates["quantize.perplexity_increase"].max == 0.01
    for name in ("format.cites_rule", "format.confidence", "format.answer", "language.hinglish"):
        assert _stops_promotion(gates[name]), name


@pytest.mark.parametrize(
    ("answer", "matched"),
    [
        ("Answer: Ketu\nRule: the star lord of Ashwini\nConfidence: High", {"answer", "cites_rule", "confidence"}),
        ("Jawab Ketu hai.\nConfidence: medium", {"confidence"}),
        ("Answer:\nRule:\nConfidence: sure", set()),
        ("The answer: Ketu. Rule: none. Confidence: High or Low", set()),
    ],
)
def test_kp_formats_tell_a_good_answer_from_a_bad_one(kp: Recipe, answer: str, matched: set[str]) -> None:
    assert {name for name, pattern in kp.stages.evaluate.formats.items() if re.search(pattern, answer)} == matched


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"stages": {"dapt": {"lora": {"rank": 16}}}}, "recipe.stages.dapt.lora.rank"),
        ({"stages": {"sft": {"train": {"epochs": 0}}}}, "recipe.stages.sft.train.epochs"),
        ({"stages": {"quantize": {"schemes": ["int3"]}}}, "recipe.stages.quantize.schemes.0"),
        ({"gates": [{"metric": "exact.sft"}]}, "recipe.gates.0"),
        ({"trust_remote_code": True}, "recipe.trust_remote_code"),
    ],
)
def test_a_wrong_key_is_named_by_its_path(change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_recipe({"name": "x", "base_model": "y", **change})
    assert caught.value.param == param


def _stops_promotion(gate: Gate) -> bool:
    return gate.min is not None and gate.min > 0 and gate.action in ("hold", "fail")
