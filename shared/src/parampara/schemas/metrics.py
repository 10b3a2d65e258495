"""The names of the metrics that an evaluation or a deployment reports, which are those that a gate may name."""

from __future__ import annotations

import re
from collections.abc import Collection

METRICS = (
    "perplexity.<model>",
    "validation_loss.<model>",
    "dapt.perplexity_reduction",
    "dapt.loss.before|after",
    "sft.validation_loss.before|after|trend|above_best",
    "sft.perplexity_change",
    "dpo.validation_loss.before|after",
    "dpo.reward_accuracy|reward_margin|exact_change|perplexity_change",
    "exact.<model>",
    "exact.kinds_mean",
    "exact.kind.<kind>",
    "exact.language.<language>",
    "format.<name>",
    "language.english|hinglish",
    "language.reference.english|hinglish",
    "language.cmi|switches.answers|reference|difference",
    "quantize.perplexity_increase|exact_change|same_answer",
    "parity.<transition>.kl|top1|greedy_match|greedy_prefix|perplexity_change|recovered|base_kl|differs_from_base|adapter_base",
    "parity.<transition>.tokenizer|chat_template|generation_config",
    "parity.live.kl|top1|perplexity_change|greedy_match|greedy_prefix|chat_template|generation_config",
    "serving.openai_format|tokens_per_second|tokens_per_second_4_streams|first_token_seconds",
    "size.base_bytes|merged_bytes|quantized_bytes",
    "deploy.memory_bytes|kv_bytes_per_token",
    "judge.score|judged",
    "judge.score|judged.<model>",
    "harness.<task>.<figure>",
    "comparison.items|won|lost|exact_difference|exact_low|exact_high|loss_difference|loss_low|loss_high",
)
"""Fractions, not per cent. ``kind`` and ``language`` are those of the questions, ``name`` is one of ``params.formats`` and ``task`` one of
``params.harness``, as :func:`harness_task` writes it; ``judge`` without a model is about the one to be served; ``parity.live`` and
``serving`` are measured at deployment (:func:`is_live`)."""

MODELS = ("base", "dapt", "sft", "dpo", "quantized")
"""The models that texts and questions are put to, oldest first. A line has ``dpo`` where its recipe has that stage, and ``sft`` is then
not the last model before quantization: see :func:`last_merged`."""

_PLACES = {"<model>": "|".join(MODELS), "<transition>": "dapt|sft|merged|quantized"}
_ANY = "[a-z0-9_]+"
# without that stage the merge after sft is the final one, and its transition is called "merged"
_OF_DPO = re.compile(r"dpo\..+|parity\.sft\..+|(perplexity|validation_loss|exact|judge\.score|judge\.judged)\.dpo")


def harness_task(name: str) -> str:
    """A name of lm-evaluation-harness as a metric may hold it: ``MMLU-pro`` is ``mmlu_pro``."""
    return re.sub(r"[^a-z0-9_]", "_", name.lower())


def last_merged(models: Collection[str]) -> str:
    """The final merged model of a line, which is the last one before quantization; ``models`` are the names of all of its models."""
    return "dpo" if "dpo" in models else "sft"


def is_of_dpo(metric: str) -> bool:
    """Whether only a line with stage dpo has this metric."""
    return _OF_DPO.fullmatch(metric) is not None


def is_live(metric: str) -> bool:
    """Whether a metric is measured on the live endpoint, when a model is deployed, and not by the evaluation."""
    return metric.startswith(("parity.live.", "serving."))


def is_reported(metric: str, *, formats: Collection[str] | None = None) -> bool:
    """Whether an evaluation or deployment can report this metric; ``formats`` are the names that ``format.<name>`` may have (None: any)."""
    group, _, name = metric.partition(".")
    if group == "format" and formats is not None:
        return name in formats
    return any(pattern.fullmatch(metric) for pattern in _PATTERNS)


def _pattern(documented: str) -> re.Pattern[str]:
    parts = [_PLACES.get(part, _ANY) if part.startswith("<") else part for part in documented.split(".")]
    return re.compile(r"\.".join(f"(?:{part})" for part in parts))


_PATTERNS = [_pattern(documented) for documented in METRICS]
