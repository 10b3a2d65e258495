"""Losses of given text: perplexity of held-out books, and the loss of held-out answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from evaluator.meter import Meter
from evaluator.models import Loaded
from parampara.datasets.scored import Loss, Scored, answer_sequences, batches, longest_first, text_sequences
from parampara.errors import InvalidData

__all__ = ["Loss", "Scored", "answer_sequences", "log_probs", "longest_first", "loss", "text_sequences"]

_LOGITS = 1 << 26
"""Logit values computed at once: 256 MiB in float32."""
_MAX_ROWS = 64


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
