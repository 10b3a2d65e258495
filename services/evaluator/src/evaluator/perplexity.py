"""Losses of given text: perplexity of held-out books, and the loss of held-out answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evaluator.meter import Meter
from evaluator.models import Conversation, Loaded, segments
from parampara.errors import InvalidData

_LOGITS = 1 << 26
"""Logit values computed at once: 256 MiB in float32."""
_MAX_ROWS = 64


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


def loss(model: Loaded, sequences: Sequence[Scored], meter: Meter) -> Loss:
    """Summed loss of the counted tokens; sequences are batched longest first.

    Raises:
        InvalidData: no token counts.
        Preempted: asked to stop.
    """
    nats, tokens = 0.0, 0
    for batch in _batches(model, sequences):
        sums, counts = _batch_loss(model, batch)
        nats, tokens = nats + sums, tokens + counts
        meter.advance(len(batch), loss=nats / max(tokens, 1))
    if tokens == 0:
        raise InvalidData("No held-out token to measure: the held-out data is empty or too short.", param="text")
    return Loss(nats=nats, tokens=tokens)


def log_probs(model: Loaded, sequences: Sequence[Scored]) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token after each counted token of each sequence.

    One float32 tensor on CPU of shape (counted tokens, vocabulary) per sequence, longest sequence first: the same order for every model.
    """
    for batch in _batches(model, sequences):
        ids, seen = _padded(model, batch)
        with torch.inference_mode():
            logits = model.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
            for index, row in enumerate(batch):
                counted = torch.tensor(row.counted, device=logits.device)
                yield logits[index, : len(row.ids)][counted].float().log_softmax(-1).cpu()


def _answers_counted(tokenizer: Any, conversation: Conversation) -> Scored:
    parts = segments(tokenizer, conversation)
    return Scored(ids=[token for ids, _ in parts for token in ids], counted=[answer for ids, answer in parts for _ in ids])


def _batches(model: Loaded, sequences: Sequence[Scored]) -> Iterator[list[Scored]]:
    vocabulary = model.model.config.get_text_config().vocab_size
    waiting = sorted(sequences, key=lambda sequence: -len(sequence.ids))
    while waiting:
        rows = max(1, min(_MAX_ROWS, _LOGITS // (vocabulary * len(waiting[0].ids))))
        yield waiting[:rows]
        waiting = waiting[rows:]


def _batch_loss(model: Loaded, batch: list[Scored]) -> tuple[float, int]:
    ids, seen = _padded(model, batch)
    longest = ids.shape[1]
    counted = torch.tensor([row.counted + [False] * (longest - len(row.counted)) for row in batch])[:, 1:].to(model.device)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return float(losses[counted].double().sum()), int(counted.sum())


def _padded(model: Loaded, batch: list[Scored]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and their attention mask."""
    longest = len(batch[0].ids)
    ids = [row.ids + [model.pad_id] * (longest - len(row.ids)) for row in batch]
    seen = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch]
    return torch.tensor(ids, device=model.device), torch.tensor(seen, device=model.device)
