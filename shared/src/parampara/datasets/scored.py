"""Token sequences of which some tokens count: what perplexities of held-out text and losses of held-out answers are measured on.

Without torch; the services that run models compute the losses, all on the same sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from parampara.datasets.chat import Conversation, segments, token_ids


@dataclass(frozen=True)
class Scored:
    """A token sequence; ``counted[i]`` says whether the loss of token ``i``, given those before it, counts."""

    ids: list[int]
    counted: list[bool]


@dataclass(frozen=True)
class Loss:
    """Summed negative log-likelihood in nats over ``tokens`` predicted tokens."""

    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token (Jelinek et al. 1977); infinite above e^700."""
        return math.exp(self.mean) if self.mean < 700 else math.inf


def text_sequences(tokenizer: Any, texts: Sequence[str], *, max_tokens: int) -> list[Scored]:
    """Each text with the tokenizer's own special tokens, cut at ``max_tokens``; every token after the first counts."""
    sequences = [tokenizer(text, truncation=True, max_length=max_tokens).input_ids for text in texts]
    return [Scored(ids=ids, counted=[False] + [True] * (len(ids) - 1)) for ids in sequences if len(ids) > 1]


def answer_sequences(tokenizer: Any, conversations: Sequence[Conversation], *, max_tokens: int) -> list[Scored]:
    """Whole conversations in which only the tokens of the assistant's turns count, end marks included.

    A conversation that is cut before its first answer token is left out.

    Raises:
        InvalidData: the tokenizer has no chat template, or one that does not render turn by turn.
    """
    sequences = [_answers_counted(tokenizer, conversation) for conversation in conversations]
    cut = [Scored(sequence.ids[:max_tokens], sequence.counted[:max_tokens]) for sequence in sequences]
    return [sequence for sequence in cut if any(sequence.counted)]


def longest_first(sequences: Sequence[Scored]) -> list[Scored]:
    """The order in which sequences are run: the same for every model, and memory runs out at the start if at all."""
    return sorted(sequences, key=lambda sequence: -len(sequence.ids))


def batches(sequences: Sequence[Scored], *, tokens: int, rows: int) -> Iterator[list[Scored]]:
    """The sequences longest first, in batches of at most ``rows`` that hold at most ``tokens`` tokens, padding included.

    A sequence that is longer by itself is a batch of one.
    """
    waiting = longest_first(sequences)
    while waiting:
        fitting = max(1, min(rows, tokens // len(waiting[0].ids)))
        yield waiting[:fitting]
        waiting = waiting[fitting:]


def _answers_counted(tokenizer: Any, conversation: Conversation) -> Scored:
    parts = [(token_ids(tokenizer, text), answer) for text, answer in segments(tokenizer, conversation)]
    return Scored(ids=[token for ids, _ in parts for token in ids], counted=[answer for ids, answer in parts for _ in ids])
