"""Losses against a cross-entropy that is written out by hand, one sequence at a time."""

from __future__ import annotations

import math

import pytest

from evaluator.meter import Meter
from evaluator.models import loaded, prompt_ids
from evaluator.perplexity import Loss, answer_sequences, loss, text_sequences
from parampara.errors import InvalidData
from parampara.progress import SilentProgress
from tests.evaluator.lines import Line

TEXTS = ["Ketu rules seven years.", "Rahu ka dasha atharah saal ka hota hai, aur Guru ka solah saal ka.", "Sun"]
CONVERSATION = [
    {"role": "user", "content": "Who rules Ashwini?"},
    {"role": "assistant", "content": "Answer: Ketu"},
    {"role": "user", "content": "Aur Bharani?"},
    {"role": "assistant", "content": "Answer: Venus"},
]


def test_perplexity_is_the_hand_computed_one(line: Line) -> None:
    import torch

    with loaded("base", line.root / "base") as model:
        sequences = text_sequences(model.tokenizer, TEXTS, max_tokens=64)
        measured = loss(model, sequences, Meter(SilentProgress(), total=3))
        nats, tokens = 0.0, 0
        for text in TEXTS:
            ids = model.tokenizer(text).input_ids
            with torch.inference_mode():
                probabilities = model.model(torch.tensor([ids])).logits[0].double().softmax(-1)
            for position in range(1, len(ids)):
                nats -= math.log(float(probabilities[position - 1, ids[position]]))
                tokens += 1
    assert measured.tokens == tokens
    assert measured.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_texts_are_cut_at_the_limit(line: Line) -> None:
    with loaded("base", line.root / "base") as model:
        (sequence,) = text_sequences(model.tokenizer, TEXTS[1:2], max_tokens=5)
    assert len(sequence.ids) == 5
    assert sequence.counted == [False, True, True, True, True]


def test_only_answer_tokens_count_each_with_its_end_mark(line: Line) -> None:
    with loaded("base", line.root / "base") as model:
        (sequence,) = answer_sequences(model.tokenizer, [CONVERSATION], max_tokens=256)
        counted = [token for token, counts in zip(sequence.ids, sequence.counted, strict=True) if counts]
        assert model.tokenizer.decode(counted) == "Answer: Ketu<|eot_id|>Answer: Venus<|eot_id|>"
        first = prompt_ids(model.tokenizer, CONVERSATION[:1])
        assert sequence.ids[: len(first)] == first
        assert not any(sequence.counted[: len(first)])


def test_a_conversation_cut_before_its_answer_is_left_out(line: Line) -> None:
    with loaded("base", line.root / "base") as model:
        assert answer_sequences(model.tokenizer, [CONVERSATION], max_tokens=4) == []
        with pytest.raises(InvalidData, match="No held-out token"):
            loss(model, [], Meter(SilentProgress(), total=1))


def test_an_absurd_loss_is_an_infinite_perplexity_not_an_overflow() -> None:
    assert Loss(nats=8000.0, tokens=10).perplexity == math.inf
