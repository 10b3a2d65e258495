"""Losses of given text: perplexity of held-out books, and the loss of held-out answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from evaluator.meter import Meter
from evaluator.models import Loaded
from parampara.datasets.scored import Loss, Scored, answer_sequences, batches, longest_first, text_sequences
from parampara.errors import InvalidData

__all__ = ["Loss", "Scored", "answer_sequences", "log_probs", "longest_first", "loss", "losses", "text_sequences", "total"]

_LOGITS = 1 << 26
"""Logit values computed at once: 256 MiB in float32."""
_MAX_ROWS = 64


def loss(model: Loaded, sequences: Sequence[Scored], meter: Meter) -> Loss:
    """Summed loss of the counted tokens; sequences are batched longest first.

    Raises:
        InvalidData: no token counts.
        Preempted: asked to stop.
    """
    return total(losses(model, sequences, meter))


def losses(model: Loaded, sequences: Sequence[Scored], meter: Meter) -> list[Loss]:
    """The loss of each sequence, in their order; a sequence of which no token counts has a loss over 0 tokens.

    Raises:
        Preempted: asked to stop.
    """
    order = iter(sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids)))  # that of the batches
    found: dict[int, Loss] = {}
    for batch in _batches(model, sequences):
        found |= {next(order): of for of in _batch_losses(model, batch)}
        nats, tokens = sum(of.nats for of in found.values()), sum(of.tokens for of in found.values())
        meter.advance(len(batch), loss=nats / max(tokens, 1))
    return [found[index] for index in range(len(sequences))]


def total(parts: Sequence[Loss]) -> Loss:
    """All of them together.

    Raises:
        InvalidData: no token counts.
    """
    summed = Loss(nats=sum(part.nats for part in parts), tokens=sum(part.tokens for part in parts))
    if summed.tokens == 0:
        raise InvalidData("No held-out token to measure: the held-out data is empty or too short.", param="text")
    return summed


def log_probs(model: Loaded, sequences: Sequence[Scored]) -> Iterator[torch.Tensor]:
    """Log-probabilities of the next token after each counted token of each sequence.

    One float32 tensor on CPU of shape (counted tokens, vocabulary) per sequence, in the order of :func:`longest_first`.
    """
    for batch in _batches(model, sequences):
        ids, seen = _padded(model, batch)
        with torch.inference_mode():
            logits = model.model(input_ids=ids, attention_mask=seen, use_cache=False).logits
            for index, row in enumerate(batch):
                counted = torch.tensor(row.counted, device=logits.device)
                yield logits[index, : len(row.ids)][counted].float().log_softmax(-1).cpu()


def _batches(model: Loaded, sequences: Sequence[Scored]) -> Iterator[list[Scored]]:
    vocabulary = model.model.config.get_text_config().vocab_size
    return batches(sequences, tokens=_LOGITS // vocabulary, rows=_MAX_ROWS)


def _batch_losses(model: Loaded, batch: list[Scored]) -> list[Loss]:
    ids, seen = _padded(model, batch)
    longest = ids.shape[1]
    counted = torch.tensor([row.counted + [False] * (longest - len(row.counted)) for row in batch])[:, 1:].to(model.device)
    with torch.inference_mode():
        logits = model.model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return [Loss(nats=float(row[counts].double().sum()), tokens=int(counts.sum())) for row, counts in zip(nats, counted, strict=True)]


def _padded(model: Loaded, batch: list[Scored]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, padded on the right, and their attention mask."""
    longest = len(batch[0].ids)
    ids = [row.ids + [model.pad_id] * (longest - len(row.ids)) for row in batch]
    seen = [[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in batch]
    return torch.tensor(ids, device=model.device), torch.tensor(seen, device=model.device)
