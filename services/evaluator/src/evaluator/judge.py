"""Answers of the models from SFT on, graded by a language model elsewhere: an answer in other words than the reference is not an exact one.

Each distinct answer to a question is judged once, whichever models gave it. What could not be judged is counted and has no score.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from evaluator.answers import Question
from evaluator.judge_client import Case, EndpointFailed, JudgeClient, Unreadable
from evaluator.line import Measured
from evaluator.meter import Meter
from parampara.errors import InvalidRequest, Unavailable
from parampara.schemas.comparison import Item, Judgement
from parampara.schemas.stages import EvaluateConfig, JudgeEndpoint, JudgeParams

_JUDGED_MODELS = ("sft", "dpo", "quantized")
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 15.0
_GIVE_UP_AFTER = 10
"""Judgements in a row for which the endpoint gave no completion, each tried five times: the others are then not asked for."""
_EXAMPLE = Case("Which star does the earth go round?", "Answer: the sun", "It goes round the sun.")


@dataclass(frozen=True)
class Judge:
    """A judge and the way to it, both as the configuration names them."""

    params: JudgeParams
    endpoint: JudgeEndpoint
    api_key: str = field(default="", repr=False)


def find_judge(config: EvaluateConfig, *, api_key: str) -> Judge | None:
    """The judge that ``params.judge`` asks for; None where it asks for none.

    Raises:
        InvalidRequest: it asks for one, and the configuration names no endpoint; code ``judge_not_configured``.
    """
    if config.params.judge is None:
        return None
    if config.judge_endpoint is None:
        raise InvalidRequest(
            "params.judge asks for a judge, and judge_endpoint does not say where it is reached.",
            param="judge_endpoint",
            code="judge_not_configured",
        )
    return Judge(config.params.judge, config.judge_endpoint, api_key)


def work(judge: Judge | None, config: EvaluateConfig, questions: int) -> int:
    """Items that judging takes, as :class:`evaluator.meter.Meter` counts them."""
    if judge is None:
        return 0
    models = 1 + (config.dpo_adapter is not None) + (config.quantized is not None)
    return min(judge.params.max_questions, questions) * models


def require_answering(judge: Judge, meter: Meter) -> None:
    """Have the judge grade an example, so that a wrong address, key or name is found before hours go into measuring.

    Raises:
        InvalidRequest: the endpoint refuses the request, or what comes back is no grade; code ``judge_failed``.
        Unavailable: the endpoint cannot be reached, or is overloaded.
        Preempted: asked to stop.
    """
    meter.phase("ask the judge for an example")
    judgements = asyncio.run(_ask_all(judge, [_EXAMPLE], meter, strict=True))
    assert judgements[0].score is not None


def judge_items(
    judge: Judge, items: Sequence[Item], questions: Sequence[Question], measured: dict[str, Measured], meter: Meter
) -> list[Item]:
    """``items`` with a judgement of each answer of the models from SFT on to the first ``max_questions`` of the questions.

    Raises:
        Preempted: asked to stop.
    """
    meter.phase(f"answers judged by {judge.params.model}")
    models = [name for name in _JUDGED_MODELS if name in measured]
    asked = range(min(judge.params.max_questions, len(questions)))
    cases = {(index, name): _case(questions[index], measured[name].answers[index]) for index in asked for name in models}
    distinct = list(dict.fromkeys(cases.values()))
    meter.advance(len(cases) - len(distinct))
    judged = dict(zip(distinct, asyncio.run(_ask_all(judge, distinct, meter)), strict=True))
    if failed := [case for case in cases.values() if judged[case].error]:
        first = judged[failed[0]].error
        meter.warn(f"{len(failed)} of {len(cases)} answers were not judged and have no score. The first: {first}.")
    told = {key: judged[case] for key, case in cases.items()}
    return [_with_judgements(item, {name: told.get((index, name)) for name in models}) for index, item in enumerate(items)]


def metrics(items: Sequence[Item]) -> dict[str, float]:
    """``judge.score`` and ``judge.judged`` of each judged model, and once more without a name of the one that is to be served."""
    found: dict[str, float] = {}
    served: dict[str, float] = {}
    for name in _JUDGED_MODELS:  # the one to be served comes last
        asked = [told for item in items if name in item.models and (told := item.models[name].judgement) is not None]
        scores = [told.score for told in asked if told.score is not None]
        if not asked:
            continue
        served = {"judged": len(scores) / len(asked)} | ({"score": sum(scores) / len(scores)} if scores else {})
        found |= {f"judge.{figure}.{name}": value for figure, value in served.items()}
    return found | {f"judge.{figure}": value for figure, value in served.items()}


async def _ask_all(judge: Judge, cases: Sequence[Case], meter: Meter, *, strict: bool = False) -> list[Judgement]:
    """Judgements in the order of ``cases``, ``concurrency`` at a time; ``strict`` raises what else becomes a judgement's error."""
    async with JudgeClient(judge.endpoint, judge.params, api_key=judge.api_key) as client:
        bench = _Bench(client, judge.endpoint.concurrency, strict=strict)
        tasks = [asyncio.create_task(bench.judge(case)) for case in cases]
        said = time.monotonic()
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if done and not strict:
                    meter.advance(len(done))
                elif time.monotonic() - said >= _REPORT_SECONDS:  # a stage that says nothing for long is taken for stuck
                    meter.advance(0)
                else:
                    meter.check()
                    continue
                said = time.monotonic()
                meter.check()
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for one in ended:
            if isinstance(one, BaseException):
                raise one
        return [task.result() for task in tasks]


class _Bench:
    """Lets a few cases at a time to the judge, and none any more once the endpoint has failed too often."""

    def __init__(self, client: JudgeClient, places: int, *, strict: bool) -> None:
        self._client, self._places, self._strict = client, asyncio.Semaphore(places), strict
        self._failed_in_a_row = 0

    async def judge(self, case: Case) -> Judgement:
        async with self._places:
            if self._failed_in_a_row >= _GIVE_UP_AFTER:
                return Judgement(error=f"not asked: the endpoint had failed {_GIVE_UP_AFTER} times in a row")
            try:
                told = await self._client.grade(case)
            except EndpointFailed as error:
                self._failed_in_a_row += 1
                return self._failed(error)
            except Unreadable as error:
                self._failed_in_a_row = 0
                return self._failed(error)
            self._failed_in_a_row = 0
            return told

    def _failed(self, error: EndpointFailed | Unreadable) -> Judgement:
        if not self._strict:
            return Judgement(error=str(error))
        message = f"The judge at PARAMPARA_EVALUATOR__JUDGE_BASE_URL did not grade an example: {error}."
        if isinstance(error, EndpointFailed) and not error.final:
            raise Unavailable(message, param="params.judge", code="judge_unavailable") from None
        raise InvalidRequest(message, param="params.judge", code="judge_failed") from None


def _case(question: Question, answer: str) -> Case:
    asked = [message for message in question.prompt if message["role"] != "system"]
    text = question.text if len(asked) == 1 else "\n".join(f"{message['role']}: {message['content']}" for message in asked)
    return Case(question=text, reference=question.reference, answer=answer)


def _with_judgements(item: Item, judgements: dict[str, Judgement | None]) -> Item:
    judged = {name: item.models[name].model_copy(update={"judgement": judgement}) for name, judgement in judgements.items()}
    return item.model_copy(update={"models": item.models | judged})
