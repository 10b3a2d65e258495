"""The parity ledger: is the next model of the line the same model as the one before it?

Each transition compares a candidate with its reference on a fixed probe set (held-out conversations, teacher forced): an
adapter on its base with the merged model, and the final merged model with the quantized one. Recorded distributions lie in files,
so that only one model is in memory at a time; ``evaluator.ledger`` says how long.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evaluator.answers import generate_ids
from evaluator.meter import Meter
from evaluator.models import Conversation, Loaded, prompt_ids, segments
from evaluator.perplexity import Loss, Scored, log_probs, longest_first
from parampara.errors import InvalidData

DIFFERS_KL = 1e-4
"""Nats per token from which a model counts as another one. All run in one type, in which rounding a model to FP16 measures 1e-8 to
1e-6; training measures 0.1 and more."""
_ANSWER_TOKENS = 256
_PROMPT_TOKENS = 16
"""What is recorded of a probe: its answer, and the end of its prompt. A vocabulary of 128,256 takes 0.5 MB per token."""


@dataclass(frozen=True)
class Probe:
    """A whole conversation, of which the first ``prompt`` tokens are the question as the model sees it.

    ``scored.counted`` marks the tokens whose predictions are recorded."""

    scored: Scored
    prompt: int


@dataclass(frozen=True)
class Recording:
    """What one model did on the probes: log-probabilities in ``directory`` (a file of float32 (tokens, vocabulary) per probe),
    greedy answers, and the loss of the tokens that the probes really hold."""

    name: str
    directory: Path
    greedy: list[list[int]]
    loss: Loss

    def log_probs(self, probe: int) -> torch.Tensor:
        return load_file(self.directory / _file_name(probe))["log_probs"]

    def delete(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


@dataclass(frozen=True)
class Agreement:
    kl: float
    """KL(reference || candidate), mean over all probe tokens, nats."""
    top1: float
    """Share of tokens where both name the same most likely next token."""
    greedy_match: float
    """Share of probes whose greedy answers are identical."""
    greedy_prefix: float
    """Mean share of the reference's greedy answer before the first different token."""
    perplexity_change: float
    """Perplexity of the probes, candidate against reference: 0.01 is one per cent more."""


def make_probes(tokenizer: Any, conversations: Sequence[Conversation], *, max_tokens: int) -> list[Probe]:
    """Token sequences of the conversations as the base's tokenizer renders them, to be given to every model.

    Each ends 256 answer tokens after its prompt, or at ``max_tokens``.
    """
    probes = []
    for conversation in conversations:
        ids = [token for part, _ in segments(tokenizer, conversation) for token in part]
        prompt = min(len(prompt_ids(tokenizer, conversation[:-1])), max_tokens)
        ids = ids[: min(prompt + _ANSWER_TOKENS, max_tokens)]
        first = max(prompt - _PROMPT_TOKENS, 0)
        probes.append(Probe(scored=Scored(ids, [index >= first for index in range(len(ids))]), prompt=prompt))
    return probes


def record(model: Loaded, probes: Sequence[Probe], *, directory: Path, max_new_tokens: int, meter: Meter) -> Recording:
    """Run the probes through a model and keep what it says below ``directory / <name>``, one file per probe.

    Raises:
        Preempted: asked to stop.
    """
    own = directory / model.name
    own.mkdir(parents=True, exist_ok=True)
    sequences = longest_first([probe.scored for probe in probes])
    nats, tokens = 0.0, 0
    for number, (sequence, told) in enumerate(zip(sequences, log_probs(model, sequences), strict=True)):
        save_file({"log_probs": told}, own / _file_name(number))
        followed = torch.tensor(_next_tokens(sequence), dtype=torch.int64)
        nats -= float(told[: len(followed)].gather(1, followed[:, None]).double().sum())
        tokens += len(followed)
        meter.advance(1)
    greedy = generate_ids(model, [probe.scored.ids[: probe.prompt] for probe in probes], max_new_tokens=max_new_tokens, meter=meter)
    return Recording(name=model.name, directory=own, greedy=greedy, loss=Loss(nats=nats, tokens=tokens))


def compare(reference: Recording, candidate: Recording, *, meter: Meter) -> Agreement:
    """Agreement of two recordings of the same probes; on the GPU where there is one, probe by probe.

    Raises:
        InvalidData: the vocabularies differ, so these are not versions of one model.
        Preempted: asked to stop.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kl, same, tokens = 0.0, 0, 0
    for probe in range(len(reference.greedy)):
        meter.check()
        expected, got = (recording.log_probs(probe).to(device).double() for recording in (reference, candidate))
        if expected.shape != got.shape:
            raise InvalidData(
                f"{candidate.name} has a vocabulary of {got.shape[-1]}, {reference.name} of {expected.shape[-1]}: "
                "one cannot be made from the other.",
                param=candidate.name,
            )
        kl += float((expected.exp() * (expected - got)).sum())
        same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        tokens += expected.shape[0]
    pairs = list(zip(reference.greedy, candidate.greedy, strict=True))
    return Agreement(
        kl=max(kl / tokens, 0.0),  # below zero only by rounding
        top1=same / tokens,
        greedy_match=_mean([first == second for first, second in pairs]),
        greedy_prefix=_mean([_common_prefix(first, second) for first, second in pairs]),
        perplexity_change=candidate.loss.perplexity / reference.loss.perplexity - 1,
    )


def recovered(kl: float, kl_of_origin: float) -> float:
    """How much of what the adapter changed is in the merged model: 1 - KL(adapted || merged) / KL(adapted || before it).

    1 for an exact merge, 0 for one that was skipped, in between for a wrong scale, below 0 for damage. An adapter that changes
    nothing measurable counts as recovered if the merged model changed nothing either.
    """
    if kl_of_origin < DIFFERS_KL:
        return 1.0 if kl < DIFFERS_KL else 0.0
    return 1.0 - kl / kl_of_origin


def _file_name(probe: int) -> str:
    return f"{probe:05d}.safetensors"


def _next_tokens(sequence: Scored) -> list[int]:
    """The token that follows each counted token; the last token of a sequence is followed by none."""
    return [following for counts, following in zip(sequence.counted, sequence.ids[1:], strict=False) if counts]


def _common_prefix(first: list[int], second: list[int]) -> float:
    if not first:
        return float(not second)
    return next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), min(len(first), len(second))) / len(
        first
    )


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else 0.0
