"""From a recipe to jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from parampara.errors import InvalidRequest
from parampara.plan import QUEUES, check_datasets, plan_run
from parampara.schemas.recipe import load_recipe, parse_recipe

DATASETS = {"books": ["file-a"], "books_validation": [], "qa": ["file-b"], "qa_validation": ["file-c"]}
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


def test_dependencies_come_earlier_and_cover_every_input() -> None:
    planned = plan_run(parse_recipe({"name": "r", "base_model": "b"}), DATASETS)
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
        check_datasets(datasets)
    assert caught.value.param == param
