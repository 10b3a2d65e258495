"""How the rows of one optimizer step lie in memory: cut into micro-batches under a token budget, exact in every cut.

*flat*: documents end to end in one row without padding, each kept apart by :mod:`trainer.attention`. *padded*: documents of
similar length one below the other. Both give the loss and gradient that each document gives alone; which one a model can
take is tried on it before training (:func:`keeps_rows_apart`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from trainer import attention
from trainer.binning import best_fit, by_length
from trainer.faults import is_out_of_memory
from trainer.rows import IGNORED, TokenRow

Kind = Literal["flat", "padded"]


@dataclass(frozen=True)
class Layout:
    """``max_tokens`` limits the positions of a micro-batch; a longer document is a micro-batch of its own."""

    kind: Kind
    reason: str
    max_tokens: int
    pad_token_id: int
    learnt_only: bool = False
    """flat: logits are computed only where there is something to learn; needs transformers' own forward."""

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the documents of each micro-batch, the one with the longest document first."""
        return best_fit(lengths, self.max_tokens) if self.kind == "flat" else by_length(lengths, self.max_tokens)

    def positions(self, lengths: Sequence[int]) -> list[int]:
        """Positions of each micro-batch, padding included."""
        groups = [[lengths[i] for i in group] for group in self.groups(lengths)]
        return [sum(group) if self.kind == "flat" else len(group) * max(group) for group in groups]

    def cost(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Memory of a step, to compare: the largest micro-batch, then the longest document."""
        return max(self.positions(lengths)), max(lengths)

    def collate(self, rows: Iterable[TokenRow]) -> list[dict[str, Any]]:
        """The micro-batches of one step as the model's arguments."""
        documents = [document for row in rows for document in row.split()]
        build = self._flat if self.kind == "flat" else self._padded
        return [build([documents[i] for i in group]) for group in self.groups([len(document.input_ids) for document in documents])]

    def _flat(self, documents: list[TokenRow]) -> dict[str, Any]:
        lengths = tuple(len(document.input_ids) for document in documents)
        labels = torch.tensor([label for document in documents for label in (IGNORED, *document.labels[1:])])
        batch = {
            "input_ids": torch.tensor([[token for document in documents for token in document.input_ids]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "labels": labels[None],
            "row_lengths": lengths,
            "cu_seq_lens_q": torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        }
        if self.learnt_only:
            learnt = (labels != IGNORED).nonzero().flatten()
            batch.update(logits_to_keep=learnt - 1, shift_labels=labels[learnt][None])
        return batch

    def _padded(self, documents: list[TokenRow]) -> dict[str, Any]:
        from torch.nn.utils.rnn import pad_sequence

        ids = [torch.tensor(document.input_ids) for document in documents]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([torch.tensor(row.labels) for row in documents], batch_first=True, padding_value=IGNORED),
        }


def documents_in(batch: dict[str, Any]) -> int:
    """Of a micro-batch that a :class:`Layout` made: how many parts it could be cut into."""
    if "completion_mask" in batch:  # pairs of documents, which stay together
        return len(batch["input_ids"]) // 2
    return len(batch["row_lengths"]) if "row_lengths" in batch else len(batch["input_ids"])


def choose_layout(model: Any, *, backend: str, max_tokens: int, longest: int, pad_token_id: int, autocast: Any) -> Layout:
    """The flat layout where the model keeps its rows apart, else the padded one; sets the model's attention accordingly.

    ``longest`` is the length of the longest document: a model whose layers see less of it than all before a token is padded.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    layout = Layout("flat", "the model's attention keeps rows apart", max_tokens, pad_token_id)
    attention.register()
    if not getattr(base, "_supports_attention_backend", False):
        fault = "its attention can not be chosen"
    elif (fault := sees_less_than_all(base.config.get_text_config(), longest)) is None:
        base.set_attn_implementation(attention.NAME)
        fault = keeps_rows_apart(model, layout, autocast=autocast)
        if fault is None:
            fewer = replace(layout, learnt_only=True)
            return fewer if backend == "trl" and _same_loss(model, layout, fewer, autocast=autocast) else layout
        base.set_attn_implementation(before)
    return Layout("padded", f"rows are padded: {type(base).__name__}: {fault}", max_tokens, pad_token_id)


def keeps_rows_apart(model: Any, layout: Layout, *, autocast: Any) -> str | None:
    """Try two rows in one flat batch: None if the second one is untouched by the first, bit by bit, and reads as it does alone.

    Else what went wrong. Leaves the model in the mode that it was in.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)
    first, other, second = ([(seed + 7 * i) % vocabulary for i in range(length)] for seed, length in ((3, 11), (5, 11), (1, 9)))
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            beside, beside_other, alone = (
                _last_logits(model, layout, rows, len(second)) for rows in ([first, second], [other, second], [second])
            )
    except Exception as error:  # a forward that takes no such arguments may fail in any way
        if is_out_of_memory(error):
            raise
        return f"its forward does not take a flat batch ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
    finally:
        model.train(training)
    if not torch.equal(beside, beside_other):
        return "a row changes the one behind it"
    if not float((beside - alone).norm()) <= _TOLERANCE * float(alone.norm()):
        return "a row reads otherwise in company than alone"
    return None


_TOLERANCE = 0.02
"""Relative; bfloat16 rounds at 0.004."""
_WINDOWS = {"sliding_attention", "chunked_attention"}


def sees_less_than_all(config: Any, longest: int) -> str | None:
    """What of a text model's attention the flat layout does not know: windows that a document may be longer than, other layers."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if others := sorted(kinds - {"full_attention"} - _WINDOWS):
        return f"it has layers of the kind {', '.join(others)}"
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if window is not None and window < longest and (not kinds or kinds & _WINDOWS):
        return f"its attention sees {window} tokens, and a document may have {longest}"
    return None


def _same_loss(model: Any, layout: Layout, other: Layout, *, autocast: Any) -> bool:
    """Both layouts give the loss of the same rows, half learnt, within rounding."""
    rows = [TokenRow(ids, [IGNORED] * 4 + ids[4:]) for ids in ([3, 10, 17, 24, 31, 38, 45], [1, 8, 15, 22, 29, 36])]
    device, training = next(model.parameters()).device, model.training
    model.eval()
    losses = []
    try:
        with torch.no_grad(), autocast():
            for batch in (layout._flat(rows), other._flat(rows)):
                inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
                losses.append(float(model(**inputs, use_cache=False).loss))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return False
    finally:
        model.train(training)
    return abs(losses[0] - losses[1]) <= _TOLERANCE * abs(losses[0])


def _last_logits(model: Any, layout: Layout, rows: list[list[int]], count: int) -> torch.Tensor:
    batch = layout._flat([TokenRow(row, row) for row in rows])
    kept = {key: value for key, value in batch.items() if key not in ("labels", "shift_labels", "logits_to_keep")}
    device = next(model.parameters()).device
    inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in kept.items()}
    return model(**inputs, use_cache=False).logits[0, -count:].float()
