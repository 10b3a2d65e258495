"""From measurements to the flat metrics that gates name; ``parampara.schemas.metrics`` lists the names."""

from __future__ import annotations

import math
from pathlib import Path

from evaluator import code_mixing, memory
from evaluator.answers import Question, answer_part, exact_rates, format_rates, normalise, share
from evaluator.curves import preference_metrics
from evaluator.language import Language, language_rate
from evaluator.line import Material, Measured
from parampara.schemas.ledger import ParityLedger
from parampara.schemas.metrics import last_merged
from parampara.schemas.stages import EvaluateConfig, Sample

_SAMPLES = 8
_RATED_LANGUAGES: list[Language] = ["english", "hinglish"]


def collect(config: EvaluateConfig, measured: dict[str, Measured], material: Material, ledger: ParityLedger) -> dict[str, float]:
    """Every metric of the line; a value may be infinite or NaN where a model is broken."""
    questions = material.held_out.questions
    sizes = {f"size.{name}_bytes": float(memory.weight_bytes(path)) for name, path in _weights(config).items()}
    served = config.quantized or config.merged
    sizes |= memory.metrics(served, config.deploy_params) if config.deploy_params is not None else {}
    learnt = preference_metrics(config.dpo_adapter) if config.dpo_adapter is not None else {}
    return ledger.metrics() | _losses(measured) | learnt | _answer_rates(config, measured, questions) | _mixing(measured, material) | sizes


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
        metrics["sft.perplexity_change"] = metrics["perplexity.sft"] / metrics["perplexity.dapt"] - 1
    if "dpo" in measured:
        metrics["dpo.perplexity_change"] = metrics["perplexity.dpo"] / metrics["perplexity.sft"] - 1
    if "quantized" in measured:
        metrics["quantize.perplexity_increase"] = metrics["perplexity.quantized"] / metrics[f"perplexity.{last_merged(measured)}"] - 1
    return metrics


def _answer_rates(config: EvaluateConfig, measured: dict[str, Measured], questions: list[Question]) -> dict[str, float]:
    metrics = {f"exact.{name}": exact_rates(questions, model.answers).overall for name, model in measured.items() if model.answers}
    last = last_merged(measured)
    answers = measured[last].answers
    rates = exact_rates(questions, answers)
    if rates.by_kind:
        metrics["exact.kinds_mean"] = sum(rates.by_kind.values()) / len(rates.by_kind)
    metrics |= {f"exact.kind.{_key(kind)}": rate for kind, rate in rates.by_kind.items()}
    metrics |= {f"exact.language.{_key(language)}": rate for language, rate in rates.by_language.items()}
    metrics |= {f"format.{_key(name)}": rate for name, rate in format_rates(config.params.formats, answers).items()}
    asked = [question.language for question in questions]
    references = [question.reference for question in questions]
    for language in _RATED_LANGUAGES:
        told = {f"language.{language}": answers, f"language.reference.{language}": references}
        metrics |= {name: rate for name, texts in told.items() if (rate := language_rate(asked, texts, language)) is not None}
    if "dpo" in measured:
        metrics["dpo.exact_change"] = metrics["exact.dpo"] - metrics["exact.sft"]
    if "quantized" in measured:
        pairs = zip(answers, measured["quantized"].answers, strict=True)
        metrics["quantize.exact_change"] = metrics["exact.quantized"] - metrics[f"exact.{last}"]
        metrics["quantize.same_answer"] = share([normalise(answer_part(a)) == normalise(answer_part(b)) for a, b in pairs])
    return metrics


def _mixing(measured: dict[str, Measured], material: Material) -> dict[str, float]:
    """How the final merged model mixes English into Hinglish, beside how the data does."""
    if (lexicon := material.held_out.lexicon) is None:
        return {}
    pairs = zip(material.held_out.questions, measured[last_merged(measured)].answers, strict=True)
    asked = [(question.reference, answer) for question, answer in pairs if question.language == "hinglish"]
    return code_mixing.metrics(lexicon, answers=[answer for _, answer in asked], references=[reference for reference, _ in asked])


def _weights(config: EvaluateConfig) -> dict[str, Path]:
    named = {"base": config.base, "merged": config.merged, "quantized": config.quantized}
    return {name: path for name, path in named.items() if path is not None}


def _key(name: str) -> str:
    """A name as a metric path may hold it: lower case, digits and underscores."""
    return "".join(character if character.isascii() and character.isalnum() else "_" for character in name.casefold())
