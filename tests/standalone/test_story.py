"""What the demo insists on."""

from __future__ import annotations

import pytest

from parampara.errors import UpstreamFailed
from standalone.asking import Answer, Citation, Question
from standalone.demo.story import check_answer


def answered(*, model: str = "ft:tiny:org:kp:1", cited: tuple[bool, ...] = (False, True)) -> Answer:
    return Answer(
        question=Question(text="Who rules Ashwini?"),
        text="Answer: Ketu",
        model=model,
        citations=[Citation(marker="[1]", title="stars.txt", text="", cited=value) for value in cited],
        seconds=1,
        first_token_seconds=1,
    )


def test_an_answer_of_this_runs_model_that_cites_a_passage_is_accepted() -> None:
    check_answer(answered(), model="ft:tiny:org:kp:1")


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (answered(model="ft:tiny:org:kp:0"), "wrong_model"),
        (answered(cited=()), "not_cited"),
        (answered(cited=(False, False)), "not_cited"),
    ],
)
def test_passages_that_were_only_retrieved_are_no_citations(answer: Answer, code: str) -> None:
    with pytest.raises(UpstreamFailed) as caught:
        check_answer(answer, model="ft:tiny:org:kp:1")
    assert caught.value.code == code
