"""The gate between schemes: how much worse a quantized model predicts held-out text and held-out answers than its parent.

Both are teacher forced: the loss of every token given those before it, so a figure does not hang on one early word of a generated
answer. Parent and child see the same tokens in the same batches; each is in memory alone.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parampara.datasets.chat import conversation_of, token_ids
from parampara.datasets.held_out import held_out_rows, held_out_texts
from parampara.datasets.scored import Loss, Scored, answer_sequences, batches, text_sequences
from parampara.errors import InvalidData
from parampara.progress import Progress, SilentProgress
from parampara.schemas.stages import QuantizeConfig
from quantizer.checkpoint import agreement, open_model, probe_log_probs, read_config

if TYPE_CHECKING:
    import torch

    from parampara.weights.merged import MergedModel

_LOGITS = 1 << 26
"""Logit values computed at once: 256 MiB in float32."""
_MAX_ROWS = 64


@dataclass(frozen=True)
class HeldOut:
    """Token sequences that training never saw; empty where the stage was given no data."""

    texts: list[Scored] = field(default_factory=list)
    answers: list[Scored] = field(default_factory=list)


NOTHING = HeldOut()


@dataclass(frozen=True)
class Measured:
    """What one model says: ``probes`` as :func:`quantizer.checkpoint.probe_log_probs` gives them; losses are None without data."""

    probes: torch.Tensor
    text: Loss | None = None
    answer: Loss | None = None


@dataclass(frozen=True)
class Figures:
    """A quantized model against its parent. Increases are relative (0.01 is one per cent) and None where there was no data."""

    kl: float
    """Mean Kullback-Leibler divergence from the parent on the probes, nats per token."""
    top1: float
    """Share of probe positions where both name the same most likely token."""
    perplexity_increase: float | None = None
    answer_perplexity_increase: float | None = None

    def above(self, limit: float) -> bool:
        """Whether an increase is above ``limit`` or not a number."""
        return any(
            not increase <= limit for increase in (self.perplexity_increase, self.answer_perplexity_increase) if increase is not None
        )

    @property
    def told(self) -> str:
        increases = {"held-out text": self.perplexity_increase, "held-out answers": self.answer_perplexity_increase}
        measured = [f"perplexity of {what} {value:+.2%}" for what, value in increases.items() if value is not None]
        degradation = ", ".join(measured) or "no held-out data was given, so degradation was not measured"
        return f"{degradation}; KL {self.kl:.2e} nats per token, same most likely token {self.top1:.1%}"


def read_held_out(config: QuantizeConfig) -> HeldOut:
    """The held-out items that the evaluation takes too, as token sequences of the model's own tokenizer.

    Raises:
        InvalidData: a file is missing or not what it has to be, nothing is held out, or no answer fits ``max_seq_length``.
    """
    if config.text is None and config.qa is None:
        return NOTHING
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model, local_files_only=True)
    positions = read_config(config.model).get("max_position_embeddings", 1 << 20)
    return HeldOut(texts=_texts(config, tokenizer, positions), answers=_answers(config, tokenizer, positions))


def measure(
    model: Path | MergedModel,
    held_out: HeldOut = NOTHING,
    progress: Progress | None = None,
    *,
    check_stop: Callable[[], None] = lambda: None,
) -> Measured:
    """Load a model, quantized or not, or a base with the adapters to merge into it, and measure it.

    Raises:
        OutOfMemoryError, MemoryError: it does not fit this machine.
        Other errors of the libraries where it cannot be loaded, and what ``check_stop`` raises between batches.
    """
    loaded = open_model(model)
    try:
        done = _Count(progress or SilentProgress(), total=len(held_out.texts) + len(held_out.answers), check_stop=check_stop)
        return Measured(
            probes=probe_log_probs(loaded), text=_loss(loaded, held_out.texts, done), answer=_loss(loaded, held_out.answers, done)
        )
    finally:
        del loaded
        gc.collect()  # its modules refer to each other: the next model must not find this one in memory


def compare(parent: Measured, child: Measured) -> Figures:
    """Figures of a child that was measured on the same sequences as its parent; NaN in the child gives NaN."""
    probed = agreement(parent.probes, child.probes)
    return Figures(
        kl=probed.kl,
        top1=probed.top1,
        perplexity_increase=_increase(parent.text, child.text),
        answer_perplexity_increase=_increase(parent.answer, child.answer),
    )


class _Count:
    """Counts measured sequences into a progress."""

    def __init__(self, progress: Progress, *, total: int, check_stop: Callable[[], None]) -> None:
        self._progress, self._total, self._check_stop = progress, total, check_stop
        self._done = 0

    def advance(self, items: int) -> None:
        self._done += items
        self._progress.step(self._done, self._total)
        self._check_stop()


def _texts(config: QuantizeConfig, tokenizer: Any, positions: int) -> list[Scored]:
    if config.text is None:
        return []
    limit, params = config.params.max_chunks, config.dapt_params
    texts = held_out_texts(config.text, params, limit=limit, seed=config.seed, count_tokens=lambda text: len(token_ids(tokenizer, text)))
    return text_sequences(tokenizer, texts, max_tokens=min(params.chunk_tokens + 1, positions))


def _answers(config: QuantizeConfig, tokenizer: Any, positions: int) -> list[Scored]:
    if config.qa is None:
        return []
    params = config.sft_params
    rows = held_out_rows(config.qa, params, limit=config.params.max_questions, seed=config.seed)
    conversations = [conversation_of(row, system_prompt=params.system_prompt) for row in rows]
    max_tokens = min(params.train.max_seq_length, positions)
    sequences = answer_sequences(tokenizer, conversations, max_tokens=max_tokens)
    if not sequences:
        raise InvalidData(f"No held-out answer begins within the first {max_tokens} tokens of its conversation.", param="qa")
    return sequences


def _loss(model: Any, sequences: Sequence[Scored], done: _Count) -> Loss | None:
    """Summed loss of the counted tokens; None without sequences."""
    nats, tokens = 0.0, 0
    vocabulary = model.config.get_text_config().vocab_size
    for batch in batches(sequences, tokens=_LOGITS // vocabulary, rows=_MAX_ROWS):
        sums, counts = _batch_loss(model, batch)
        nats, tokens = nats + sums, tokens + counts
        done.advance(len(batch))
    return Loss(nats=nats, tokens=tokens) if tokens else None


def _batch_loss(model: Any, batch: list[Scored]) -> tuple[float, int]:
    """One batch, padded on the right: what stands behind a token changes nothing before it."""
    import torch

    longest = len(batch[0].ids)
    ids, seen, counted = (
        torch.tensor([values(row) + [0] * (longest - len(row.ids)) for row in batch], device=model.device)
        for values in (lambda row: row.ids, lambda row: [1] * len(row.ids), lambda row: [int(counts) for counts in row.counted])
    )
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    chosen = counted[:, 1:].bool()
    return float(losses[chosen].double().sum()), int(chosen.sum())


def _increase(parent: Loss | None, child: Loss | None) -> float | None:
    if parent is None or child is None:
        return None
    return math.nan if math.isinf(child.perplexity) else child.perplexity / parent.perplexity - 1
