"""Questions put to a model: greedy answers, the exact-answer rate, and how many answers have the asked form."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from evaluator.meter import Meter
from evaluator.models import Conversation, Loaded, prompt_ids
from parampara.errors import InvalidData, InvalidRequest
from parampara.execution import stop

_ANSWER_LINE = re.compile(r"^\s*answer\s*:\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
_QUOTED = re.compile(r"""^\s*(["'])(.*)\1[\s.]*$""", re.DOTALL)
_PLAIN_QUOTES = str.maketrans({"’": "'", "‘": "'", "′": "'", "“": '"', "”": '"', "″": '"'})
_MEANT = [
    (re.compile("°"), " degrees "),
    (re.compile(r"(?<=\d)\s?'(?!\w*[^\W\d])"), " minutes "),  # but not the apostrophe of "1990's"
    (re.compile(r'(?<=\d)\s?"'), " seconds "),
    (re.compile("%"), " percent "),
    (re.compile(r"(?<![\w)])[-−](?=[.]?\d)"), " minus "),  # but not the dash of "5-10"
]
"""Marks that change what a number means, and the words that stand for them."""
_NOT_WORDS = re.compile(r"(?!(?<=\d)\.(?=\d))[^\w\s]|_")
_BATCH_TOKENS = 32_768
"""Prompt and answer tokens of a batch together: its KV cache is 4 GiB for an 8B Llama, a few MiB for a tiny one."""
_MAX_ROWS = 256


@dataclass(frozen=True)
class Question:
    """A held-out conversation that ends before the answer, and what the answer should be."""

    prompt: Conversation
    reference: str
    """The whole answer as the data gives it."""
    expected: str
    """The part that an exact answer has to equal."""
    kind: str = ""
    language: str = ""

    @property
    def text(self) -> str:
        return self.prompt[-1]["content"]

    @property
    def conversation(self) -> Conversation:
        return [*self.prompt, {"role": "assistant", "content": self.reference}]


@dataclass(frozen=True)
class ExactRates:
    overall: float
    by_kind: dict[str, float] = field(default_factory=dict)
    by_language: dict[str, float] = field(default_factory=dict)


def generate(model: Loaded, questions: Sequence[Question], *, max_new_tokens: int, meter: Meter) -> list[str]:
    """Greedy answers in the order of ``questions``, without special tokens.

    Raises:
        Preempted: asked to stop.
    """
    prompts = [prompt_ids(model.tokenizer, question.prompt) for question in questions]
    answers = generate_ids(model, prompts, max_new_tokens=max_new_tokens, meter=meter)
    return [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def generate_ids(model: Loaded, prompts: Sequence[list[int]], *, max_new_tokens: int, meter: Meter) -> list[list[int]]:
    """Greedy continuations in the order of ``prompts``, up to and without the stop token.

    A prompt that leaves no room for ``max_new_tokens`` in the model's positions loses its oldest tokens.

    Raises:
        InvalidRequest: ``max_new_tokens`` alone fills the model's positions.
    """
    room = model.max_tokens - max_new_tokens
    if room < 1:
        raise InvalidRequest(
            f"max_new_tokens {max_new_tokens} leaves no room for a question in the model's {model.max_tokens} positions.",
            param="params.max_new_tokens",
        )
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    answers: list[list[int]] = [[] for _ in prompts]
    while order:
        length = min(len(prompts[order[0]]), room) + max_new_tokens
        chosen = order[: max(1, min(_MAX_ROWS, _BATCH_TOKENS // length))]
        order = order[len(chosen) :]
        for index, ids in zip(chosen, _generate_batch(model, [prompts[i][-room:] for i in chosen], max_new_tokens), strict=True):
            answers[index] = ids
        meter.advance(len(chosen))
    return answers


def exact_answer(text: str, expected: str) -> bool:
    """Whether the ``Answer:`` line of ``text`` (all of it if there is none) equals ``expected`` after :func:`normalise`."""
    return normalise(answer_part(text)) == normalise(expected)


def answer_part(text: str) -> str:
    """What stands behind ``Answer:`` on its line, or the whole text."""
    found = _ANSWER_LINE.search(text)
    return found.group(1) if found else text.strip()


def normalise(text: str) -> str:
    """Compatibility form (NFKC) without case, punctuation, quotes around it and runs of space: ``" The Sun. "`` is ``"the sun"``.

    What belongs to a number stays: sign, decimal point, per cent, and the marks of degrees, minutes and seconds.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_PLAIN_QUOTES).replace("''", '"')
    if quoted := _QUOTED.match(plain):
        plain = quoted.group(2)
    for mark, word in _MEANT:
        plain = mark.sub(word, plain)
    return " ".join(_NOT_WORDS.sub(" ", plain).casefold().split())


def exact_rates(questions: Sequence[Question], answers: Sequence[str]) -> ExactRates:
    """Share of exact answers: overall, per kind of question and per language."""
    kinds: dict[str, list[bool]] = defaultdict(list)
    languages: dict[str, list[bool]] = defaultdict(list)
    hits = [exact_answer(answer, question.expected) for question, answer in zip(questions, answers, strict=True)]
    for question, hit in zip(questions, hits, strict=True):
        kinds[question.kind].append(hit)
        languages[question.language].append(hit)
    return ExactRates(
        overall=share(hits),
        by_kind={name: share(of) for name, of in sorted(kinds.items()) if name},
        by_language={name: share(of) for name, of in sorted(languages.items()) if name},
    )


def format_rates(formats: dict[str, str], answers: Sequence[str]) -> dict[str, float]:
    """Share of answers in which each regular expression is found (multi-line, case as given).

    Raises:
        InvalidRequest: an expression does not compile.
    """
    return {name: share([bool(pattern.search(answer)) for answer in answers]) for name, pattern in compile_formats(formats).items()}


def compile_formats(formats: dict[str, str]) -> dict[str, re.Pattern[str]]:
    """Compile ``params.formats``.

    Raises:
        InvalidRequest: names the expression at fault.
    """
    compiled = {}
    for name, expression in formats.items():
        try:
            compiled[name] = re.compile(expression, re.MULTILINE)
        except re.error as error:
            raise InvalidRequest(f"{expression!r} is not a regular expression: {error}.", param=f"params.formats.{name}") from None
    return compiled


def share(hits: Sequence[bool]) -> float:
    if not hits:
        raise InvalidData("There is no held-out question to measure.", param="qa")
    return sum(hits) / len(hits)


class _StopWish(StoppingCriteria):
    """Ends a batch early when the stage was asked to stop; the meter then raises."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), stop.requested(), device=input_ids.device, dtype=torch.bool)


def _generate_batch(model: Loaded, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """One left-padded batch with a KV cache."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[model.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=model.stop_ids, pad_token_id=model.pad_id)
    with torch.inference_mode():
        output = model.model.generate(
            input_ids=ids, attention_mask=seen, generation_config=greedy, stopping_criteria=StoppingCriteriaList([_StopWish()])
        )
    return [_until_stop(row[longest:].tolist(), model.stop_ids) for row in output]


def _until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    return next((ids[:index] for index, token in enumerate(ids) if token in stop_ids), ids)
