"""The parity ledger: is the next model of the line the same model as the one before it?

Each transition compares a candidate with its reference on a fixed probe set (held-out conversations, teacher forced): an
adapter on its base with the merged model, and the merged model with the quantized one. Recorded distributions lie in files,
so that only one model is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from evaluator.answers import generate_ids
from evaluator.meter import Meter
from evaluator.models import Conversation, Loaded, prompt_ids, segments
from evaluator.perplexity import Scored, log_probs
from parampara.errors import InvalidData

DIFFERS_KL = 1e-5
"""Nats per token from which a model counts as another one: rounding a model to FP16 measures 1e-8 to 1e-6."""
_PROBE_TOKENS = 256


@dataclass(frozen=True)
class Probe:
    """A whole conversation, of which the first ``prompt`` tokens are the question as the model sees it."""

    scored: Scored
    prompt: int


@dataclass(frozen=True)
class Recording:
    """What one model did on the probes: log-probabilities (float32, a tensor (tokens, vocabulary) per probe) and greedy answers."""

    name: str
    path: Path
    greedy: list[list[int]]


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

    def metrics(self, transition: str) -> dict[str, float]:
        return {f"parity.{transition}.{name}": value for name, value in vars(self).items()}


def make_probes(tokenizer: Any, conversations: Sequence[Conversation], *, max_tokens: int) -> list[Probe]:
    """Probes of at most 256 tokens, rendered once (by the base's tokenizer) and given to every model."""
    probes = []
    for conversation in conversations:
        ids = [token for part, _ in segments(tokenizer, conversation) for token in part]
        limit = min(_PROBE_TOKENS, max_tokens)
        probes.append(
            Probe(scored=Scored(ids[:limit], [True] * len(ids[:limit])), prompt=min(len(prompt_ids(tokenizer, conversation[:-1])), limit))
        )
    return probes


def record(model: Loaded, probes: Sequence[Probe], *, directory: Path, max_new_tokens: int, meter: Meter) -> Recording:
    """Run the probes through a model and keep what it says in ``directory / <name>.safetensors``.

    Raises:
        Preempted: asked to stop.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for batch in log_probs(model, [probe.scored for probe in probes]):
        tensors |= {str(len(tensors) + index): told for index, told in enumerate(batch)}
        meter.advance(len(batch))
    path = directory / f"{model.name}.safetensors"
    save_file(tensors, path)
    greedy = generate_ids(model, [probe.scored.ids[: probe.prompt] for probe in probes], max_new_tokens=max_new_tokens, meter=meter)
    return Recording(name=model.name, path=path, greedy=greedy)


def compare(reference: Recording, candidate: Recording) -> Agreement:
    """Agreement of two recordings of the same probes.

    Raises:
        InvalidData: the vocabularies differ, so these are not versions of one model.
    """
    kl, same, tokens = 0.0, 0, 0
    with safe_open(reference.path, framework="pt") as before, safe_open(candidate.path, framework="pt") as after:
        for name in before.keys():  # noqa: SIM118 (a file, not a mapping)
            expected, got = before.get_tensor(name).double(), after.get_tensor(name).double()
            if expected.shape != got.shape:
                raise InvalidData(
                    f"{candidate.name} has a vocabulary of {got.shape[-1]}, {reference.name} of {expected.shape[-1]}: "
                    "one cannot be made from the other.",
                    param=candidate.name,
                )
            kl += float((expected.exp() * (expected - got)).sum())
            same += int((expected.argmax(-1) == got.argmax(-1)).sum())
            tokens += expected.shape[0]
    return Agreement(
        kl=max(kl / tokens, 0.0),  # below zero only by rounding
        top1=same / tokens,
        greedy_match=_mean([first == second for first, second in zip(reference.greedy, candidate.greedy, strict=True)]),
        greedy_prefix=_mean([_common_prefix(first, second) for first, second in zip(reference.greedy, candidate.greedy, strict=True)]),
    )


def recovered(kl: float, kl_of_origin: float) -> float:
    """How much of what the adapter changed is in the merged model: 1 - KL(adapted || merged) / KL(adapted || before it).

    1 for an exact merge, 0 for one that was skipped, in between for a wrong scale, below 0 for damage. An adapter that changes
    nothing measurable counts as recovered if the merged model changed nothing either.
    """
    if kl_of_origin < DIFFERS_KL:
        return 1.0 if kl < DIFFERS_KL else 0.0
    return 1.0 - kl / kl_of_origin


def same_prompts(reference: Any, candidate: Any, conversations: Sequence[Conversation]) -> float:
    """Share of conversations that both tokenizers render, template and all, to the same token ids."""
    return _mean([_rendered(reference, item[:-1]) == _rendered(candidate, item[:-1]) for item in conversations])


def same_generation_config(reference: Path, candidate: Path) -> float:
    """1.0 if both model directories say the same about generation (or both say nothing), else 0.0."""
    return float(_generation_config(reference) == _generation_config(candidate))


def _rendered(tokenizer: Any, conversation: Conversation) -> list[int] | None:
    return prompt_ids(tokenizer, conversation) if tokenizer.chat_template else None


def _generation_config(directory: Path) -> dict[str, Any]:
    path = directory / "generation_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {key: value for key, value in stored.items() if key not in ("transformers_version", "_from_model_config")}


def _common_prefix(first: list[int], second: list[int]) -> float:
    if not first:
        return float(not second)
    return next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), min(len(first), len(second))) / len(
        first
    )


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean()) if values else 0.0
