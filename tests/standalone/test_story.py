"""What the demo insists on."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from parampara.errors import InvalidRequest, UpstreamFailed
from standalone.asking import Answer, Citation, Question
from standalone.client import Target
from standalone.demo.story import check_answer, run_demo
from standalone.places import Places


def answered(*, model: str = "ft:tiny:org:kp:1", cited: tuple[bool, ...] = (False, True), matches: bool | None = None) -> Answer:
    return Answer(
        question=Question(text="Who rules Ashwini?"),
        text="Answer: Ketu",
        model=model,
        citations=[Citation(marker="[1]", title="stars.txt", text="", cited=value) for value in cited],
        seconds=1,
        first_token_seconds=1,
        matches=matches,
    )


def test_an_answer_of_this_runs_model_that_cites_a_passage_is_accepted() -> None:
    check_answer(answered(), model="ft:tiny:org:kp:1")


def test_a_wrong_answer_stands_in_no_passage_and_needs_no_citation() -> None:
    check_answer(answered(cited=(False, False), matches=False), model="ft:tiny:org:kp:1")


def demo(tmp_path: Path, *, deploy: str) -> int:
    """The demo against an address where nothing listens; everything before its first request is real."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: x\nbase_model: tiny-llama\nstages:\n  deploy: {deploy}\n")
    places = Places(project=Path(__file__).parents[2], home=tmp_path)
    target = Target(places, base_url="http://127.0.0.1:9/v1", api_key="pp_x")
    return run_demo(target, Console(quiet=True), recipe=recipe, fresh=False, auto_ports=False)


def test_a_recipe_that_deploys_nothing_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"stages\.deploy is null"):
        demo(tmp_path, deploy="null")
    assert not (tmp_path / "demo").exists()


def test_a_demo_that_fails_leaves_no_report_of_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    for name in ("report.json", "report.html"):
        (tmp_path / "demo" / name).write_text("of yesterday")
    assert demo(tmp_path, deploy="{alias: other}") == 1
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["data"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (answered(model="ft:tiny:org:kp:0"), "wrong_model"),
        (answered(cited=(), matches=False), "no_passages"),
        (answered(cited=(False,), matches=True), "not_cited"),
        (answered(cited=(False, False)), "not_cited"),
    ],
)
def test_passages_that_were_only_retrieved_are_no_citations(answer: Answer, code: str) -> None:
    with pytest.raises(UpstreamFailed) as caught:
        check_answer(answer, model="ft:tiny:org:kp:1")
    assert caught.value.code == code
