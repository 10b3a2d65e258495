"""From measurements to the flat metrics that gates name; ``parampara.schemas.metrics`` lists the names."""

from __future__ import annotations

import math
from pathlib import Path

from evaluator import parity
from evaluator.answers import Question, answer_part, exact_rates, format_rates, normalise, share
from evaluator.language import Language, language_rate
from evaluator.line import Material, Measured, Member
from evaluator.meter import Meter
from evaluator.models import load_tokenizer
from parampara.errors import InvalidData
from parampara.schemas.stages import EvaluateConfig, Sample

_SAMPLES = 8
_RATED_LANGUAGES: list[Language] = ["english", "hinglish"]


def collect(
    config: EvaluateConfig, line: list[Member], measured: dict[str, Measured], material: Material, meter: Meter
) -> dict[str, float]:
    """Every metric of the line; a value may be infinite or NaN where a model is broken."""
    questions = material.held_out.questions
    sizes = {f"size.{name}_bytes": float(_weight_bytes(path)) for name, path in _weights(config).items()}
    return _parity(line, measured, material, meter) | _losses(measured) | _answer_rates(config, measured, questions) | sizes


def samples(questions: list[Question], measured: dict[str, Measured]) -> list[Sample]:
    """A few questions, one of each language and kind in turn, with every model's answer."""
    turns: dict[tuple[str, str], int] = {}
    ranked: list[tuple[int, int]] = []
    for index, question in enumerate(questions):
        group = (question.language, question.kind)
        ranked.append((turns.setdefault(group, 0), index))
        turns[group] += 1
    return [
        Sample(
            question=questions[index].text,
            language=questions[index].language,
            expected=questions[index].expected,
            answers={name: model.answers[index] for name, model in measured.items() if model.answers},
        )
        for _, index in sorted(ranked)[:_SAMPLES]
    ]


def _parity(line: list[Member], measured: dict[str, Measured], material: Material, meter: Meter) -> dict[str, float]:
    """The ledger: each transition that the line has, and whether the final model is another one than the base."""
    metrics: dict[str, float] = {}
    for name, (origin, reference, candidate) in _transitions(line).items():
        metrics |= _transition(name, origin, reference, candidate, measured, material, meter)
    change = _compared(measured["base"].recording, measured["sft"].recording, meter)
    if change is not None:
        metrics["parity.merged.base_kl"] = change.kl
        metrics["parity.merged.differs_from_base"] = float(change.kl >= parity.DIFFERS_KL)
    return metrics


def _transitions(line: list[Member]) -> dict[str, tuple[str | None, Member, Member]]:
    """Name to (model before the adapter, reference, candidate)."""
    by_name = {member.name: member for member in line}
    found: dict[str, tuple[str | None, Member, Member]] = {}
    if "dapt_adapter" in by_name:
        found["dapt"] = ("base", by_name["dapt_adapter"], by_name["dapt"])
    if "sft_adapter" in by_name:
        found["merged"] = ("dapt" if "dapt" in by_name else "base", by_name["sft_adapter"], by_name["sft"])
    elif adapted := by_name.get("dapt_adapter") or by_name.get("dapt"):
        found["merged"] = ("base", adapted, by_name["sft"])
    if "quantized" in by_name:
        found["quantized"] = (None, by_name["sft"], by_name["quantized"])
    return found


def _transition(
    name: str,
    origin: str | None,
    reference: Member,
    candidate: Member,
    measured: dict[str, Measured],
    material: Material,
    meter: Meter,
) -> dict[str, float]:
    prefix = f"parity.{name}"
    before, after = load_tokenizer(reference.source), load_tokenizer(candidate.source)
    metrics = {
        f"{prefix}.chat_template": parity.same_prompts(before, after, material.held_out.probes),
        f"{prefix}.generation_config": parity.same_generation_config(reference.directory, candidate.directory),
    }
    agreement = _compared(measured[reference.name].recording, measured[candidate.name].recording, meter)
    if agreement is None:
        return metrics
    metrics |= agreement.metrics(name)
    if origin is not None:
        changed = parity.compare(measured[reference.name].recording, measured[origin].recording)
        metrics[f"{prefix}.recovered"] = parity.recovered(agreement.kl, changed.kl)
    return metrics


def _compared(reference: parity.Recording, candidate: parity.Recording, meter: Meter) -> parity.Agreement | None:
    """None, and a warning, if the two are not versions of one model: the missing metrics then fail their gates."""
    try:
        return parity.compare(reference, candidate)
    except InvalidData as error:
        meter.warn(error.message)
        return None


def _losses(measured: dict[str, Measured]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, model in measured.items():
        if model.text is not None and model.answer is not None:
            metrics[f"perplexity.{name}"] = model.text.perplexity
            metrics[f"validation_loss.{name}"] = model.answer.mean
    before = "dapt" if "dapt" in measured else "base"
    metrics["sft.validation_loss.before"] = metrics[f"validation_loss.{before}"]
    metrics["sft.validation_loss.after"] = metrics["validation_loss.sft"]
    if "dapt" in measured:
        metrics["dapt.perplexity_reduction"] = 1 - metrics["perplexity.dapt"] / metrics["perplexity.base"]
        metrics["dapt.loss.before"] = math.log(metrics["perplexity.base"])
        metrics["dapt.loss.after"] = math.log(metrics["perplexity.dapt"])
    if "quantized" in measured:
        metrics["quantize.perplexity_increase"] = metrics["perplexity.quantized"] / metrics["perplexity.sft"] - 1
    return metrics


def _answer_rates(config: EvaluateConfig, measured: dict[str, Measured], questions: list[Question]) -> dict[str, float]:
    metrics = {f"exact.{name}": exact_rates(questions, model.answers).overall for name, model in measured.items() if model.answers}
    answers = measured["sft"].answers
    rates = exact_rates(questions, answers)
    metrics |= {f"exact.kind.{_key(kind)}": rate for kind, rate in rates.by_kind.items()}
    metrics |= {f"exact.language.{_key(language)}": rate for language, rate in rates.by_language.items()}
    metrics |= {f"format.{_key(name)}": rate for name, rate in format_rates(config.params.formats, answers).items()}
    asked = [question.language for question in questions]
    references = [question.reference for question in questions]
    for language in _RATED_LANGUAGES:
        told = {f"language.{language}": answers, f"language.reference.{language}": references}
        metrics |= {name: rate for name, texts in told.items() if (rate := language_rate(asked, texts, language)) is not None}
    if "quantized" in measured:
        pairs = zip(answers, measured["quantized"].answers, strict=True)
        metrics["quantize.exact_change"] = metrics["exact.quantized"] - metrics["exact.sft"]
        metrics["quantize.same_answer"] = share([normalise(answer_part(a)) == normalise(answer_part(b)) for a, b in pairs])
    return metrics


def _weights(config: EvaluateConfig) -> dict[str, Path]:
    named = {"base": config.base, "merged": config.merged, "quantized": config.quantized}
    return {name: path for name, path in named.items() if path is not None}


def _weight_bytes(directory: Path) -> int:
    """Bytes of weights on disk: about what a model server holds in memory beside its cache."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _key(name: str) -> str:
    """A name as a metric path may hold it: lower case, digits and underscores."""
    return "".join(character if character.isascii() and character.isalnum() else "_" for character in name.casefold())
