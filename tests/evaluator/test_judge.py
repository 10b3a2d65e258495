"""The judge: what it is shown, how its reply is read, and what happens when it fails."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from evaluator import judge as judging
from evaluator import judge_client
from evaluator.answers import Question
from evaluator.comparison import read_items
from evaluator.evaluate import run
from evaluator.items import make_items
from evaluator.judge import Judge, find_judge, judge_items, metrics, require_answering
from evaluator.judge_client import Unreadable, read_grade
from evaluator.line import Measured
from evaluator.meter import Meter
from parampara.errors import InvalidRequest, Preempted, Unavailable
from parampara.execution import stop
from parampara.progress import SilentProgress
from parampara.schemas.comparison import Item
from parampara.schemas.metrics import is_reported
from parampara.schemas.stages import EvaluateParams, Gate, JudgeEndpoint, JudgeParams
from tests.conftest import free_port
from tests.evaluator.judges import ScriptedJudge, completion, graded, refused, serving
from tests.evaluator.lines import FORMATS, Line

KEY = "sk-a-secret-of-this-test"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_client, "_BACKOFF_SECONDS", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def scripted() -> Iterator[ScriptedJudge]:
    with serving(ScriptedJudge()) as judge:
        yield judge


class Told(SilentProgress):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def event(self, message: str, **data: Any) -> None:
        self.warnings.append(message)


def questions(count: int = 4) -> list[Question]:
    return [
        Question(prompt=[{"role": "system", "content": "secret system"}, {"role": "user", "content": f"Who rules star {number}?"}],
                 reference=f"Answer: Planet {number}", expected=f"Planet {number}")
        for number in range(count)
    ]  # fmt: skip


def judged(scripted: ScriptedJudge, *, quantized: list[str] | None = None, **params: Any) -> tuple[list[Item], Told]:
    asked, told = questions(), Told()
    answers = {"base": ["no"] * 4, "sft": [f"It is Planet {number}." for number in range(4)]}
    items, measured = measured_answers(asked, **answers, **({"quantized": quantized} if quantized is not None else {}))
    judge = Judge(JudgeParams(model="grader", **params), scripted.endpoint, KEY)
    return judge_items(judge, items, asked, measured, Meter(told, total=8)), told


def measured_answers(asked: list[Question], **models: list[str]) -> tuple[list[Item], dict[str, Measured]]:
    """What an evaluation knows of its questions when the judge's turn comes."""
    measured = {name: _measured(answers) for name, answers in models.items()}
    return make_items(asked, measured), measured


def _measured(answers: list[str]) -> Measured:
    return Measured(answers=answers, answer_losses=[None] * len(answers))


# ------------------------------------------------------------------------------------------------------- what is asked


def test_the_judge_sees_question_reference_and_answer_and_a_rubric(scripted: ScriptedJudge) -> None:
    judged(scripted, scale=7, rubric="Only the planet counts.")
    request = scripted.requests[0]
    assert (request["path"], request["model"], request["temperature"]) == ("/v1/chat/completions", "grader", 0)
    system, user = request["messages"]
    assert "Only the planet counts." in system["content"] and "1 (worst) to 7 (best)" in system["content"]
    shown = json.loads(user["content"])
    assert shown["question"].startswith("Who rules star ") and shown["reference_answer"].startswith("Answer: Planet ")
    assert "secret system" not in json.dumps(request)
    schema = request["response_format"]["json_schema"]
    assert schema["strict"] is True and schema["schema"]["properties"]["score"]["enum"] == [1, 2, 3, 4, 5, 6, 7]
    assert set(scripted.keys) == {f"Bearer {KEY}"}


def test_an_answer_that_two_models_gave_is_judged_once(scripted: ScriptedJudge) -> None:
    items, _ = judged(scripted, quantized=["It is Planet 0.", "It is Planet 1.", "something else", "It is Planet 3."])
    assert len(scripted.requests) == 5
    assert all(item.models["sft"].judgement == item.models["quantized"].judgement for item in items if item.question[-2] != "2")
    assert all(item.models["base"].judgement is None for item in items)


def test_no_more_at_once_than_allowed(scripted: ScriptedJudge) -> None:
    def slowly(shown: dict[str, str], before: int) -> Any:
        time.sleep(0.05)
        return graded(5)

    scripted.answer = slowly
    judged(scripted, quantized=["a", "b", "c", "d"])
    assert len(scripted.requests) == 8
    assert 1 < scripted.most_at_once <= 3


def test_no_more_questions_than_the_recipe_says(scripted: ScriptedJudge) -> None:
    items, _ = judged(scripted, max_questions=2)
    assert [item.models["sft"].judgement is not None for item in items] == [True, True, False, False]


# ------------------------------------------------------------------------------------------------------ what is scored


def test_scores_are_grades_from_0_to_1_and_the_served_model_gives_the_metric(scripted: ScriptedJudge) -> None:
    scripted.answer = lambda shown, before: graded(1 if shown["answer"] == "wrong" else 4)
    items, _ = judged(scripted, quantized=["wrong", "It is Planet 1.", "wrong", "It is Planet 3."])
    assert metrics(items) == {
        "judge.score": 0.375, "judge.judged": 1.0,
        "judge.score.sft": 0.75, "judge.judged.sft": 1.0,
        "judge.score.quantized": 0.375, "judge.judged.quantized": 1.0,
    }  # fmt: skip
    assert all(is_reported(name) for name in metrics(items))
    assert metrics(make_items(questions(), {"sft": _measured(["x"] * 4)})) == {}


def test_what_dpo_did_to_the_answers_is_judged_too(scripted: ScriptedJudge, line: Line) -> None:
    scripted.answer = lambda shown, before: graded(1 if shown["answer"] == "wrong" else 4)
    asked, right = questions(), [f"It is Planet {number}." for number in range(4)]
    items, measured = measured_answers(asked, base=["no"] * 4, sft=["wrong"] * 4, dpo=right, quantized=right)
    judge = Judge(JudgeParams(model="grader", max_questions=4), scripted.endpoint, KEY)
    counted = judging.work(judge, line.dpo_config(), len(asked))
    found = metrics(judge_items(judge, items, asked, measured, Meter(SilentProgress(), total=counted)))
    assert (found["judge.score.sft"], found["judge.score.dpo"], found["judge.score.quantized"]) == (0.0, 0.75, 0.75)
    assert found["judge.score"] == 0.75
    assert counted == 3 * len(asked), "each question is put to the judge for three models"
    assert len(scripted.requests) == 2 * len(asked), "an answer that two of them gave is judged once"


@pytest.mark.parametrize(
    "broken",
    [
        completion("I would say four."), completion('{"reason": "cut'), completion('{"score": 9}'), completion('{"score": 4.5}'),
        completion('{"score": true}'), completion('{"score": "5"}'), completion('{"score": 5} or {"score": 1}'), completion(None),
        completion('{"reason": "x", "score": 5}', finish="length"), completion("{" * 5000), completion("[" * 50_000),
        (200, {}, "<html>hello</html>"), (200, {}, '{"choices": []}'), (200, {}, "[1]"), (200, {}, '{"choices": [null]}'),
        refused(400, "this model has no response_format"), refused(404), (302, {"Location": "http://127.0.0.1:9/"}, ""),
    ],
)  # fmt: skip
def test_what_is_no_grade_is_counted_and_never_scored(scripted: ScriptedJudge, broken: Any) -> None:
    scripted.answer = lambda shown, before: broken if "star 1" in shown["question"] else graded(5)
    items, told = judged(scripted)
    assert len(scripted.requests) == 4, "nobody asks again for what will be the same"
    assert metrics(items) == {"judge.score": 1.0, "judge.judged": 0.75, "judge.score.sft": 1.0, "judge.judged.sft": 0.75}
    judgement = items[1].models["sft"].judgement
    assert judgement is not None and judgement.score is None and judgement.error
    assert len(told.warnings) == 1 and told.warnings[0].startswith("1 of 4 answers were not judged")
    assert judgement.error in told.warnings[0]


@pytest.mark.parametrize("text", ['{"score": 4, "reason": "r"}', '```json\n{"reason": "r", "score": 4}\n```', '<think>{"score": 1}</think> {"reason": "r", "score": 4.0}',
                                  'Here: {"reason": "r", "score": 4}. Done {not json}', '{"reason": "r", "also": "line\nbreak", "score": 4}'])  # fmt: skip
def test_what_stands_around_the_grade_does_not_matter(text: str) -> None:
    assert read_grade(text, scale=5) == (4, "r")


def test_a_grade_inside_the_reason_is_no_grade() -> None:
    assert read_grade('{"reason": "{\\"score\\": 1}", "score": 5}', scale=5)[0] == 5
    with pytest.raises(Unreadable, match="no JSON objects with a score"):
        read_grade('{"outer": {"score": 5}}', scale=5)


def test_reasons_are_kept_short_and_can_be_stored(scripted: ScriptedJudge) -> None:
    scripted.answer = lambda shown, before: graded(5, "\ud800\x00" + "y" * 5000)
    items, _ = judged(scripted)
    judgement = items[0].models["sft"].judgement
    assert judgement is not None and judgement.reason == "y" * 500
    assert Item.model_validate_json(items[0].model_dump_json()) == items[0]


def test_items_without_a_judge_are_written_as_before() -> None:
    assert "judge" not in make_items(questions(), {"sft": _measured(["x"] * 4)})[0].model_dump_json()


# ----------------------------------------------------------------------------------------------------- when it fails


@pytest.mark.parametrize("fault", [refused(429, Retry_After="0"), refused(500), refused(503), (502, {}, "<html>bad gateway</html>")])
def test_a_busy_endpoint_is_asked_again(scripted: ScriptedJudge, fault: Any) -> None:
    scripted.answer = lambda shown, before: fault if before < 3 else graded(5)
    items, told = judged(scripted)
    assert metrics(items)["judge.judged"] == 1.0 and told.warnings == []
    assert len(scripted.requests) == 16


def test_it_waits_as_long_as_the_endpoint_asks(scripted: ScriptedJudge) -> None:
    scripted.answer = lambda shown, before: refused(429, Retry_After="0.4") if before == 0 else graded(5)
    began = time.monotonic()
    judged(scripted, max_questions=1)
    assert 0.4 <= time.monotonic() - began < 4


def test_an_endpoint_that_stays_away_is_given_up(scripted: ScriptedJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "_GIVE_UP_AFTER", 2)
    scripted.answer = lambda shown, before: refused(500, "down")
    items, told = judged(scripted, quantized=["a", "b", "c", "d"])
    assert len(scripted.requests) <= 5 * 4, "two failures in a row, and those that were under way"
    assert metrics(items) == {"judge.judged": 0.0, "judge.judged.sft": 0.0, "judge.judged.quantized": 0.0}
    assert told.warnings[0].startswith("8 of 8 answers were not judged")


def test_the_key_is_in_no_message(scripted: ScriptedJudge) -> None:
    for status in (400, 401):
        scripted.answer = lambda shown, before, status=status: refused(status, f"bad key {KEY}")
        items, told = judged(scripted)
        assert KEY not in "".join(item.model_dump_json() for item in items) + "".join(told.warnings)
    assert KEY not in repr(Judge(JudgeParams(model="m"), scripted.endpoint, KEY))


def test_an_endpoint_that_never_ends_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps the library's own timeouts from ever running out."""
    monkeypatch.setattr(judge_client, "_ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=_drip, args=(server,), daemon=True)
        thread.start()
        endpoint = JudgeEndpoint(base_url=f"http://127.0.0.1:{server.getsockname()[1]}", timeout_seconds=1, concurrency=1)
        began = time.monotonic()
        with pytest.raises(Unavailable, match="TimeoutError"):
            require_answering(Judge(JudgeParams(model="judge"), endpoint), Meter(SilentProgress(), total=1))
        assert time.monotonic() - began < 10


def _drip(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection, suppress(OSError):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            connection.sendall(b" ")
            time.sleep(0.1)


def test_a_wish_to_stop_ends_it_at_once(scripted: ScriptedJudge) -> None:
    first = iter([True])

    def slowly(shown: dict[str, str], before: int) -> Any:
        if next(first, False):  # once: a handler that comes late must not ask the next test to stop
            stop.request()
        time.sleep(1.5)
        return graded(5)

    scripted.answer = slowly
    began = time.monotonic()
    try:
        with pytest.raises(Preempted):
            judged(scripted)
    finally:
        stop.clear()
    assert time.monotonic() - began < 1.4


# ------------------------------------------------------------------------------------------------- before anything else


def require(scripted: ScriptedJudge, *, key: str = KEY) -> None:
    require_answering(Judge(JudgeParams(model="grader"), scripted.endpoint, key), Meter(SilentProgress(), total=1))


def test_an_endpoint_that_grades_an_example_is_taken(scripted: ScriptedJudge) -> None:
    require(scripted, key="")
    assert scripted.keys == [None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (refused(401, f"Incorrect API key provided: {KEY}"), r"refuses the key in PARAMPARA_EVALUATOR__JUDGE_API_KEY"),
        (refused(404, "The model `grader` does not exist."), r"404: The model `grader` does not exist"),
        (completion("Sure!"), r"no JSON objects with a score"),
        ((200, {}, "<html>"), r"no chat completion"),
    ],
)
def test_an_endpoint_that_does_not_grade_is_refused(scripted: ScriptedJudge, answer: Any, message: str) -> None:
    scripted.answer = lambda shown, before: answer
    with pytest.raises(InvalidRequest, match=message) as caught:
        require(scripted)
    assert (caught.value.code, caught.value.param) == ("judge_failed", "params.judge")
    assert KEY not in caught.value.message


def test_an_endpoint_that_is_away_may_be_tried_again_later(scripted: ScriptedJudge) -> None:
    away = ScriptedJudge(url=f"http://127.0.0.1:{free_port()}/v1")
    with pytest.raises(Unavailable, match=r"cannot be reached or broke off \(ConnectError\), 5 times") as caught:
        require(away)
    assert caught.value.code == "judge_unavailable"
    scripted.answer = lambda shown, before: refused(503)
    with pytest.raises(Unavailable, match=r"answered 503: no, 5 times"):
        require(scripted)


def test_a_key_that_no_header_can_carry_is_not_shown(scripted: ScriptedJudge) -> None:
    with pytest.raises(InvalidRequest, match="PARAMPARA_EVALUATOR__JUDGE_API_KEY holds characters") as caught:
        require(scripted, key="sk-\nsecret")
    assert "secret" not in caught.value.message


def test_a_judge_without_an_endpoint_is_refused_before_any_model_is_loaded(line: Line, tmp_path: Path) -> None:
    config = line.config(params=EvaluateParams(judge=JudgeParams(model="grader")), base=tmp_path / "nowhere")
    assert find_judge(line.config(), api_key="") is None
    with pytest.raises(InvalidRequest) as caught:
        run(config, workdir=tmp_path, progress=SilentProgress())
    assert caught.value.code == "judge_not_configured"


# ------------------------------------------------------------------------------------------------------ the whole stage


def test_a_whole_evaluation_with_a_judge(line: Line, tmp_path: Path, scripted: ScriptedJudge) -> None:
    scripted.answer = lambda shown, before: graded(2, "<script>alert(1)</script>")
    params = EvaluateParams(
        max_new_tokens=6,
        max_questions=8,
        max_chunks=4,
        parity_prompts=3,
        formats=FORMATS,
        judge=JudgeParams(model="grader", max_questions=3),
    )
    gates = [Gate(metric="judge.score", min=0.9, action="hold"), Gate(metric="judge.judged", min=1, action="fail")]
    config = line.config(params=params, gates=gates, judge_endpoint=scripted.endpoint)
    result = run(config, workdir=tmp_path, progress=SilentProgress(), judge_api_key=KEY)
    assert [(gate.value, gate.passed) for gate in result.gates] == [(0.25, False), (1.0, True)]
    assert result.decision == "hold"
    scored = [item for item in read_items(result.output) or [] if item.models["quantized"].judgement is not None]
    assert len(scored) == 3
    page = (result.output / "report.html").read_text()
    assert "Judged by <code>grader</code>" in page and "25.0 %" in page and "<script>alert" not in page
    for path in result.output.iterdir():
        assert KEY not in path.read_text() and scripted.url not in path.read_text(), path.name
