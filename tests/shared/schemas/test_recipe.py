"""Recipes are read strictly: what is not exactly a recipe is refused with the path to the fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from parampara.errors import InvalidRequest
from parampara.plain_yaml import read_yaml
from parampara.schemas.recipe import load_recipe, parse_recipe


def recipe(**train: Any) -> dict[str, Any]:
    return {"name": "r", "base_model": "b", "stages": {"dapt": {"train": train}}}


@pytest.mark.parametrize(
    ("train", "param"),
    [
        ({"epochs": "3"}, "recipe.stages.dapt.train.epochs"),
        ({"epochs": True}, "recipe.stages.dapt.train.epochs"),
        ({"per_device_train_batch_size": 2.5}, "recipe.stages.dapt.train.per_device_train_batch_size"),
        ({"per_device_train_batch_size": 0}, "recipe.stages.dapt.train.per_device_train_batch_size"),
        ({"packing": "yes"}, "recipe.stages.dapt.train.packing"),
        ({"optim": "sgd"}, "recipe.stages.dapt.train.optim"),
        ({"learning_rate": float("nan")}, "recipe.stages.dapt.train.learning_rate"),
        ({"learnig_rate": 1e-4}, "recipe.stages.dapt.train.learnig_rate"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(train: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_recipe(recipe(**train))
    assert caught.value.param == param


def test_a_whole_number_is_fine_where_a_number_is_asked_for() -> None:
    assert parse_recipe(recipe(epochs=3)).stages.dapt.train.epochs == 3


def test_numbers_mean_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: r\nbase_model: b\nstages: {dapt: {train: {learning_rate: 2e-4, epochs: 1}}}\n", encoding="utf-8")
    assert load_recipe(path).stages.dapt.train.learning_rate == 2e-4


@pytest.mark.parametrize("text", ["a: [1", "a: &x 1\nb: *x", "a: 1\na: 2", "? [1]\n: 2", "!!python/object:os.system {}"])
def test_yaml_that_is_not_plain_data_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_yaml(text, param="recipe")


def test_yaml_words_stay_words() -> None:
    assert read_yaml("{a: yes, b: on, c: true, d: 1e3, e: 12, f: -.5}", param="r") == {
        "a": "yes",
        "b": "on",
        "c": True,
        "d": 1000.0,
        "e": 12,
        "f": -0.5,
    }


def test_a_gate_without_a_real_bound_is_refused() -> None:
    for gate in ({"metric": "exact.sft"}, {"metric": "exact.sft", "min": float("nan")}, {"metric": "exact.sft", "min": 2, "max": 1}):
        with pytest.raises(InvalidRequest):
            parse_recipe({"name": "r", "base_model": "b", "gates": [gate]})


@pytest.mark.parametrize(
    ("stages", "gates", "param"),
    [
        ({"evaluate": {"formats": {"rule": "("}}}, [], "recipe.stages.evaluate.formats.rule"),
        ({"evaluate": {"formats": {"Rule!": "x"}}}, [], "recipe.stages.evaluate.formats.Rule!.[key]"),
        ({"dapt": {"lora": {"target_modules": ["q_proj", ""]}}}, [], "recipe.stages.dapt.lora.target_modules.1"),
        ({"sft": {"lora": {"target_modules": [".*"]}}}, [], "recipe.stages.sft.lora.target_modules.0"),
        ({"dapt": {"lora": None, "train": {"load_in_4bit": True}}}, [], "recipe.stages.dapt"),
        ({}, [{"metric": "exact.sft", "min": 0.5}, {"metric": "no.such_metric", "min": 0.5}], "recipe.gates.1.metric"),
        ({}, [{"metric": "exact", "min": 0.5}], "recipe.gates.0.metric"),
        ({}, [{"metric": "parity.sft.kl", "max": 0.5}], "recipe.gates.0.metric"),
        ({}, [{"metric": "judge.score", "min": 0.5}], "recipe.gates.0.metric"),
        ({"dpo": {"beta": 0}}, [], "recipe.stages.dpo.beta"),
        ({"dpo": {"loss_type": "sigmoid", "label_smoothing": 0.1}}, [], "recipe.stages.dpo"),
        ({"dpo": {}}, [{"metric": "dpo.reward", "min": 0.5}], "recipe.gates.0.metric"),
        ({"dpo": {}}, [{"metric": "parity.dpo.kl", "max": 0.5}], "recipe.gates.0.metric"),
        ({"evaluate": {"judge": {"model": "m", "base_url": "http://169.254.169.254/"}}}, [], "recipe.stages.evaluate.judge.base_url"),
        ({"evaluate": {"judge": {"model": "m", "api_key": "k"}}}, [], "recipe.stages.evaluate.judge.api_key"),
        ({"evaluate": {"judge": {"model": "m\nHost: x"}}}, [], "recipe.stages.evaluate.judge.model"),
        ({"evaluate": {"harness": {"tasks": ["../stars.yaml"]}}}, [], "recipe.stages.evaluate.harness.tasks.0"),
        ({"evaluate": {"harness": {"tasks": ["mmlu*"]}}}, [], "recipe.stages.evaluate.harness.tasks.0"),
        ({"evaluate": {"harness": {"tasks": []}}}, [], "recipe.stages.evaluate.harness.tasks"),
        ({"evaluate": {"harness": {"tasks": ["a-b", "A_b"]}}}, [], "recipe.stages.evaluate.harness"),
        ({"evaluate": {"harness": {"tasks": ["stars"], "include_path": "/"}}}, [], "recipe.stages.evaluate.harness.include_path"),
        ({"evaluate": {"harness": {"tasks": ["stars"]}}}, [{"metric": "harness.moons.acc", "min": 0}], "recipe.gates.0.metric"),
        ({"evaluate": {"harness": {"tasks": ["stars"]}}}, [{"metric": "harness.stars", "min": 0}], "recipe.gates.0.metric"),
        ({"evaluate": {"judge": {"model": "m", "scale": 1}}}, [], "recipe.stages.evaluate.judge.scale"),
        ({"evaluate": {"formats": {"rule": "^Rule"}}}, [{"metric": "format.rules", "min": 0.5}], "recipe.gates.0.metric"),
    ],
)
def test_what_can_never_work_is_refused_before_anything_runs(stages: dict[str, Any], gates: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_recipe({"name": "r", "base_model": "b", "stages": stages, "gates": gates})
    assert caught.value.param == param


OF_DPO = [
    *("dpo.reward_accuracy", "dpo.reward_margin", "dpo.validation_loss.after", "dpo.exact_change", "dpo.perplexity_change"),
    *("exact.dpo", "perplexity.dpo", "validation_loss.dpo", "judge.score.dpo", "parity.sft.recovered"),
]


def test_gates_on_dpo_need_the_stage() -> None:
    judge = {"evaluate": {"judge": {"model": "m"}, "formats": {"dpo": "x"}}}
    gates = [{"metric": name, "min": 0} for name in OF_DPO]
    made = parse_recipe({"name": "r", "base_model": "b", "stages": {**judge, "dpo": {}}, "gates": gates})
    assert [gate.metric for gate in made.gates] == OF_DPO
    for gate in gates:
        with pytest.raises(InvalidRequest, match=r"recipe\.stages\.dpo is null\. Add `dpo: \{\}` there") as caught:
            parse_recipe({"name": "r", "base_model": "b", "stages": judge, "gates": [gate]})
        assert caught.value.param == "recipe.gates.0.metric"
    named_alike = [{"metric": name, "min": 0} for name in ("format.dpo", "exact.kind.dpo", "parity.merged.kl")]
    assert len(parse_recipe({"name": "r", "base_model": "b", "stages": judge, "gates": named_alike}).gates) == 3


def test_dpo_is_off_unless_it_is_named() -> None:
    assert parse_recipe({"name": "r", "base_model": "b"}).stages.dpo is None
    named = parse_recipe({"name": "r", "base_model": "b", "stages": {"dpo": {}}}).stages.dpo
    assert named is not None and (named.beta, named.loss_type, named.train.learning_rate) == (0.1, "sigmoid", 1e-5)


def test_lora_null_is_full_fine_tuning_and_nothing_said_is_lora(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: r\nbase_model: b\nstages: {dapt: {lora: null}}\n", encoding="utf-8")
    stages = load_recipe(path).stages
    assert stages.dapt.lora is None
    assert stages.sft.lora is not None


def test_gates_may_name_every_metric_that_is_documented() -> None:
    names = [
        *("perplexity.quantized", "dapt.loss.after", "exact.base", "exact.kind.star_lord", "exact.language.hinglish", "format.rule"),
        *("language.reference.english", "quantize.same_answer", "parity.dapt.kl", "parity.merged.differs_from_base", "size.base_bytes"),
        *("judge.score", "judge.judged", "judge.score.quantized", "harness.mmlu_pro.exact_match_custom"),
    ]
    stages = {"evaluate": {"formats": {"rule": "^Rule"}, "judge": {"model": "m"}, "harness": {"tasks": ["MMLU-pro"]}}}
    recipe = parse_recipe({"name": "r", "base_model": "b", "stages": stages, "gates": [{"metric": name, "min": 0} for name in names]})
    assert [gate.metric for gate in recipe.gates] == names
