"""What the model that goes to the server says about a few fixed conversations, for the deployment to hold the live endpoint against.

The evaluator is the last that has the model in memory; :mod:`parampara.schemas.expectations` describes the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluator.answers import generate_ids
from evaluator.meter import Meter
from evaluator.models import Conversation, Loaded
from evaluator.perplexity import Scored, log_probs
from parampara.datasets.chat import segments, token_ids
from parampara.schemas.expectations import (
    MAX_FORCED_TOKENS,
    MAX_TOKENS,
    TOP_K,
    Expectations,
    ExpectedProbe,
    ProbeMessage,
    ServedModel,
    generation_config,
)

PROBES = 8
_DIGITS = 5
"""Of a stored log-probability: 1e-5 nats is far below what two implementations of one model differ by."""
_LOWEST = -9999.0
"""Stands for minus infinity, which JSON has not; vLLM writes the same number."""


@dataclass(frozen=True)
class Prepared:
    """A conversation as training tokenized it, before any model has seen it."""

    messages: Conversation
    prompt: str
    prompt_ids: list[int]
    forced_ids: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.forced_ids


def prepare(tokenizer: Any, conversations: Sequence[Conversation], *, positions: int) -> list[Prepared]:
    """The first conversations that fit into ``positions`` (and 1,024) tokens with an answer of 64, the longest first.

    Raises:
        InvalidData: the tokenizer has no chat template, or one that does not render turn by turn.
    """
    found: list[Prepared] = []
    for conversation in conversations:
        parts = [text for text, _ in segments(tokenizer, conversation)]
        prompt = [token for text in parts[:-1] for token in token_ids(tokenizer, text)]
        if len(prompt) + MAX_FORCED_TOKENS <= min(positions, MAX_TOKENS):
            forced = token_ids(tokenizer, parts[-1])[:MAX_FORCED_TOKENS]
            found.append(Prepared(conversation[:-1], "".join(parts[:-1]), prompt, forced))
    return sorted(found[:PROBES], key=lambda item: -len(item.ids))


def measure(
    model: Loaded, prepared: Sequence[Prepared], *, name: ServedModel, directory: Path, max_new_tokens: int, meter: Meter
) -> Expectations | None:
    """Run the conversations through ``model``, which was loaded from ``directory``; None where there is none.

    Raises:
        InvalidData: ``generation_config.json`` is not a JSON object.
        Preempted: asked to stop.
    """
    if not prepared:
        meter.warn("No probe is short enough to be replayed against the live endpoint: its parity will not be measured.")
        return None
    greedy = generate_ids(model, [item.prompt_ids for item in prepared], max_new_tokens=max_new_tokens, meter=meter)
    told = log_probs(model, [_scored(item) for item in prepared])  # longest first, as they are
    return Expectations(
        model=name,
        generation_config=generation_config(directory),
        stop_ids=model.stop_ids,
        max_new_tokens=max_new_tokens,
        probes=[_probe(item, rows, answer) for item, rows, answer in zip(prepared, told, greedy, strict=True)],
    )


def _scored(item: Prepared) -> Scored:
    """Counts the positions that predict the forced tokens."""
    first, last = len(item.prompt_ids) - 1, len(item.ids) - 1
    return Scored(item.ids, [first <= index < last for index in range(len(item.ids))])


def _probe(item: Prepared, rows: Any, greedy: list[int]) -> ExpectedProbe:
    """``rows``: float32 (forced tokens, vocabulary) log-probabilities."""
    top = rows.topk(min(TOP_K, rows.shape[-1]))
    forced = [row[token].item() for row, token in zip(rows, item.forced_ids, strict=True)]
    return ExpectedProbe(
        messages=[ProbeMessage.model_validate(message) for message in item.messages],
        prompt=item.prompt,
        prompt_ids=item.prompt_ids,
        forced_ids=item.forced_ids,
        forced_logprobs=_rounded(forced),
        top_ids=top.indices.tolist(),
        top_logprobs=[_rounded(values) for values in top.values.tolist()],
        greedy_ids=greedy,
    )


def _rounded(values: list[float]) -> list[float]:
    return [min(round(max(value, _LOWEST), _DIGITS), 0.0) for value in values]
