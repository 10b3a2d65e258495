"""From a recipe to jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from parampara.errors import InvalidRequest
from parampara.plan import ARTIFACT_KINDS, QUEUES, check_datasets, plan_run
from parampara.schemas.recipe import Recipe, load_recipe, parse_recipe

DATASETS = {"books": ["file-a"], "books_validation": [], "qa": ["file-b"], "qa_validation": ["file-c"]}
PAIRS = {"preferences": ["file-d"], "preferences_validation": ["file-e"]}
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_makes_the_whole_line(path: Path) -> None:
    planned = plan_run(load_recipe(path), DATASETS)
    assert [job.name for job in planned] == ["dapt", "merge_dapt", "sft", "merge", "quantize", "evaluate", "deploy"]
    assert [QUEUES[job.kind] for job in planned] == ["train", "merge", "train", "merge", "quantize", "evaluate", "deploy"]


def test_both_adapters_go_into_the_base_in_one_merge() -> None:
    planned = {job.name: job for job in plan_run(parse_recipe({"name": "r", "base_model": "b"}), DATASETS)}
    assert planned["merge"].inputs == {"model": [{"base": "b"}], "adapters": [{"job": "dapt"}, {"job": "sft"}]}
    assert planned["sft"].inputs["model"] == [{"job": "merge_dapt"}]
    assert planned["merge_dapt"].spec(reuse=True)["dtype_of"] == "dapt"


def recipe(**stages: Any) -> Recipe:
    return parse_recipe({"name": "r", "base_model": "b", "seed": 7, "stages": stages})


def test_dpo_trains_on_the_merged_sft_model_and_its_adapter_joins_the_final_merge() -> None:
    planned = {job.name: job for job in plan_run(recipe(dpo={"beta": 0.2}), {**DATASETS, **PAIRS})}
    assert list(planned) == ["dapt", "merge_dapt", "sft", "merge_sft", "dpo", "merge", "quantize", "evaluate", "deploy"]
    base, dapt, sft, dpo = {"base": "b"}, {"job": "dapt"}, {"job": "sft"}, {"job": "dpo"}
    assert planned["merge_sft"].inputs == {"model": [base], "adapters": [dapt, sft]}
    assert (planned["merge_sft"].kind, planned["merge_sft"].spec(reuse=True)["dtype_of"]) == ("merge", "sft")
    files = {"train": [{"file": "file-d"}], "validation": [{"file": "file-e"}]}
    assert planned["dpo"].inputs == {"model": [{"job": "merge_sft"}], **files}
    assert (planned["dpo"].kind, QUEUES["dpo"], ARTIFACT_KINDS["dpo"]) == ("dpo", "train", "adapter")
    spec = planned["dpo"].spec(reuse=True)
    assert (spec["params"]["beta"], spec["seed"], spec["backend"]) == (0.2, 7, "auto")
    assert planned["merge"].inputs == {"model": [base], "adapters": [dapt, sft, dpo]}
    assert "dtype_of" not in planned["merge"].extra
    evaluated = planned["evaluate"]
    assert (evaluated.inputs["sft_merged"], evaluated.inputs["dpo_adapter"]) == ([{"job": "merge_sft"}], [dpo])
    assert evaluated.inputs["preferences_train"] == files["train"]
    assert evaluated.extra["dpo_params"] == spec["params"]


def test_dpo_learns_for_the_system_prompt_of_sft_unless_it_has_one() -> None:
    def prompt(**dpo: Any) -> str:
        planned = plan_run(recipe(sft={"system_prompt": "Cite the rule."}, dpo=dpo), {**DATASETS, **PAIRS})
        return next(job for job in planned if job.name == "dpo").params["system_prompt"]

    assert prompt() == "Cite the rule."
    assert prompt(system_prompt="Be brief.") == "Be brief."


def test_a_line_without_dpo_says_nothing_of_it() -> None:
    """Cache keys hash the specs: one word more and no product of an earlier run would be taken again."""
    specs = json.dumps([job.spec(reuse=True) for job in plan_run(recipe(), {**DATASETS, "preferences": [], "preferences_validation": []})])
    assert not [word for word in ("dpo", "preferences", "merge_sft") if word in specs]


@pytest.mark.parametrize("dpo", [None, {}])
def test_dependencies_come_earlier_and_cover_every_input(dpo: Any) -> None:
    planned = plan_run(recipe(dpo=dpo), {**DATASETS, **PAIRS})
    before: dict[str, set[str]] = {}
    for job in planned:
        needed = {name for dependency in job.depends_on for name in before[dependency] | {dependency}}
        read = {reference["job"] for group in job.inputs.values() for reference in group if "job" in reference}
        assert read <= needed, job.name
        before[job.name] = needed


def test_gates_on_the_live_endpoint_go_to_the_deployment_with_the_evaluation() -> None:
    gates = [{"metric": "exact.sft", "min": 0.5}, {"metric": "parity.live.top1", "min": 0.9}, {"metric": "serving.openai_format", "min": 1}]
    planned = {job.name: job for job in plan_run(parse_recipe({"name": "r", "base_model": "b", "gates": gates}), DATASETS)}
    judged = {name: [gate["metric"] for gate in planned[name].extra["gates"]] for name in ("evaluate", "deploy")}
    assert judged == {"evaluate": ["exact.sft"], "deploy": ["parity.live.top1", "serving.openai_format"]}
    assert planned["deploy"].inputs["evaluation"] == [{"job": "evaluate"}]


def test_a_gate_on_the_live_endpoint_of_a_run_that_deploys_nothing_is_refused() -> None:
    gates = [{"metric": "serving.tokens_per_second", "min": 50}]
    with pytest.raises(InvalidRequest, match="deploy is null") as caught:
        parse_recipe({"name": "r", "base_model": "b", "gates": gates, "stages": {"deploy": None}})
    assert caught.value.param == "recipe.gates.0.metric"


def test_a_recipe_without_deploy_ends_with_the_evaluation() -> None:
    recipe = parse_recipe({"name": "r", "base_model": "b", "stages": {"deploy": None}})
    assert plan_run(recipe, DATASETS)[-1].name == "evaluate"


@pytest.mark.parametrize(
    ("datasets", "param"),
    [
        ({}, "datasets.books"),
        ({"books": ["file-a"]}, "datasets.qa"),
        ({"books": ["file-a"], "qa": ["file-b"], "book": []}, "datasets.book"),
        ({"books": ["file-a"], "qa": [1]}, "datasets.qa"),
        ({"books": ["file-a"], "qa": ["file-b"], "qa_validation": ["file-b"]}, "datasets.qa_validation"),
    ],
)
def test_bad_datasets_are_refused_by_name(datasets: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_datasets(datasets, recipe())
    assert caught.value.param == param


BOTH = {"books": ["file-a"], "qa": ["file-b"]}


@pytest.mark.parametrize(
    ("datasets", "dpo", "param", "says"),
    [
        ({**BOTH, "preferences": ["file-d"]}, None, "datasets.preferences", "Add `dpo: {}` to the recipe's stages"),
        (
            {**BOTH, "preferences_validation": ["file-d"]},
            None,
            "datasets.preferences_validation",
            "leave datasets.preferences_validation out",
        ),
        (BOTH, {}, "datasets.preferences", "give at least one file id, or set stages.dpo to null"),
        ({**BOTH, "preferences_validation": ["file-d"]}, {}, "datasets.preferences", "is empty"),
        (
            {**BOTH, "preferences": ["file-b"]},
            {},
            "datasets.preferences",
            "File file-b is in datasets.qa and again in datasets.preferences",
        ),
    ],
)
def test_preferences_and_the_stage_that_reads_them_come_together(datasets: dict[str, Any], dpo: Any, param: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_datasets(datasets, recipe(dpo=dpo))
    assert caught.value.param == param
    assert says in caught.value.message


def test_every_dataset_has_its_list_of_ids() -> None:
    checked = check_datasets({**BOTH, "preferences": ["file-d"]}, recipe(dpo={}))
    assert checked == {**DATASETS, "qa_validation": [], "preferences": ["file-d"], "preferences_validation": []}
