"""A judge's endpoint and the directory of harness tasks come from the settings; the key reaches one stage process and no file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import select

from parampara.db.models import Run
from parampara.errors import InvalidRequest
from parampara.settings import EvaluatorSettings

JUDGED = {"judge": {"model": "grader"}}
KEY = "sk-a-secret-of-this-test"


@pytest.fixture
def judging(queue: Any) -> Any:
    configured = EvaluatorSettings(judge_base_url="https://judge.example.com/v1", judge_api_key=SecretStr(KEY), judge_concurrency=2)
    queue.settings = queue.settings.model_copy(update={"evaluator": configured})
    return queue


def test_a_run_that_asks_for_a_judge_is_refused_where_none_is_configured(queue: Any) -> None:
    with pytest.raises(InvalidRequest, match="PARAMPARA_EVALUATOR__JUDGE_BASE_URL") as caught:
        queue.start_run(evaluate=JUDGED)
    assert (caught.value.code, caught.value.param) == ("judge_not_configured", "recipe.stages.evaluate.judge")
    with queue.sessions() as session:
        assert session.scalars(select(Run)).all() == []


def test_the_key_reaches_the_stage_that_judges_and_nothing_else(judging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMPARA_EVALUATOR__JUDGE_API_KEY", KEY)  # as the worker itself has it
    run_id = judging.start_run(evaluate=JUDGED)
    assert "evaluate:succeeded" in judging.work()
    work = judging.settings.work_dir
    jobs = judging.jobs(run_id)
    logs = {name: (work / job.id / "attempt-1.log").read_text() for name, job in jobs.items()}
    assert [name for name, log in logs.items() if KEY in log] == ["evaluate"]
    config = json.loads((work / jobs["evaluate"].id / "config.json").read_text())
    assert config["judge_endpoint"] == {"base_url": "https://judge.example.com/v1", "timeout_seconds": 60.0, "concurrency": 2}
    assert KEY not in json.dumps(config)
    assert KEY not in json.dumps([[job.spec, job.result] for job in jobs.values()])


def test_an_evaluation_without_a_judge_gets_neither(judging: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAMPARA_EVALUATOR__JUDGE_API_KEY", KEY)
    run_id = judging.start_run()
    judging.work()
    directory = judging.settings.work_dir / judging.jobs(run_id)["evaluate"].id
    assert json.loads((directory / "config.json").read_text())["judge_endpoint"] is None
    assert KEY not in (directory / "attempt-1.log").read_text()


def test_a_judged_evaluation_is_never_taken_from_an_earlier_run(judging: Any) -> None:
    data = {"books": [judging.book()], "qa": [judging.upload("{}", "qa.jsonl")]}
    outcomes = {}
    tested = {"harness": {"tasks": ["stars"]}}
    for name, evaluate in {
        "first": JUDGED,
        "again": JUDGED,
        "tested": tested,
        "tested again": tested,
        "plain": {},
        "plain again": {},
    }.items():
        judging.start_run(evaluate=evaluate, deploy=None, datasets=data)
        outcomes[name] = judging.work()
    assert "evaluate:succeeded" in outcomes["again"] and "quantize:reused" in outcomes["again"]
    assert "evaluate:succeeded" in outcomes["tested again"]
    assert "evaluate:reused" in outcomes["plain again"]


def test_the_directory_of_tasks_is_this_machines(judging: Any, tmp_path: Path) -> None:
    configured = judging.settings.evaluator.model_copy(update={"harness_tasks": tmp_path})
    judging.settings = judging.settings.model_copy(update={"evaluator": configured})
    run_id = judging.start_run(evaluate={"harness": {"tasks": ["stars"]}}, deploy=None)
    judging.work()
    directory = judging.settings.work_dir / judging.jobs(run_id)["evaluate"].id
    config = json.loads((directory / "config.json").read_text())
    assert (config["harness_tasks"], config["judge_endpoint"]) == (str(tmp_path), None)
    assert KEY not in (directory / "attempt-1.log").read_text()
