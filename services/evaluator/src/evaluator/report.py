"""The report of an evaluation: report.json for programs, report.html for people (one file, nothing loaded from elsewhere)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evaluator import curves
from evaluator.curves import Curve
from evaluator.harness import FILE_NAME as HARNESS_FILE_NAME
from evaluator.items import as_lines
from parampara.schemas.comparison import Comparison, Item, Judgement
from parampara.schemas.ledger import ParityLedger
from parampara.schemas.metrics import MODELS, last_merged
from parampara.schemas.stages import EvaluateResult, JudgeParams

_MODEL_TITLES = {"base": "Base", "dapt": "DAPT", "sft": "SFT", "dpo": "DPO", "quantized": "Quantized"}
_TRANSITIONS = {
    "dapt": "DAPT adapter → merged DAPT model",
    "sft": "SFT adapter → merged SFT model",
    "quantized": "Merged model → quantized model",
}
_DECISIONS = {
    "promote": "Every gate that can hold or fail the run was met.",
    "hold": "A gate was missed: the alias stays where it is.",
    "fail": "A gate was missed that fails the run.",
}
_WORST = 10
_GROUP_TITLES = {"exact.kind": "Kind of question", "exact.language": "Language asked"}


@dataclass(frozen=True)
class Headline:
    """A figure at the top of the page: what it was and what it became."""

    title: str
    before: str
    after: str
    note: str


@dataclass(frozen=True)
class Findings:
    """All that an evaluation found out."""

    result: EvaluateResult
    ledger: ParityLedger
    history: Sequence[Curve]
    items: Sequence[Item]
    comparison: Comparison | None = None
    judge: JudgeParams | None = None
    """Who judged the answers of ``items``, and how."""
    harness: Mapping[str, Any] = field(default_factory=dict)
    """What lm-evaluation-harness found; empty where it was not asked."""


def write(findings: Findings, *, directory: Path) -> None:
    """Write report.json (the result, its path left out), report.html, ledger.json, items.jsonl and, where two models were compared,
    comparison.json, where lm-evaluation-harness was run, harness.json into ``directory``."""
    stored = findings.result.model_copy(update={"output": Path(".")})
    texts = {
        "report.json": stored.model_dump_json(indent=2) + "\n",
        "report.html": render(findings),
        "ledger.json": findings.ledger.model_dump_json(indent=2) + "\n",
        "items.jsonl": as_lines(findings.items),
    }
    if findings.comparison is not None:
        texts["comparison.json"] = findings.comparison.model_dump_json(indent=2) + "\n"
    if findings.harness:
        texts[HARNESS_FILE_NAME] = json.dumps(findings.harness, indent=2) + "\n"
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def render(findings: Findings) -> str:
    """The HTML page; every value that came from data or models is escaped."""
    environment = Environment(
        loader=PackageLoader("evaluator", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "percent": percent, "bound": _bound, "change": change}
    result, metrics = findings.result, findings.result.metrics
    return environment.get_template("report.html.j2").render(
        result=result,
        verdict=_DECISIONS[result.decision],
        headlines=_headlines(metrics),
        charts=[(curve.title, curves.draw(curve), curve.note) for curve in findings.history],
        models=[(name, _MODEL_TITLES[name]) for name in MODELS if f"perplexity.{name}" in metrics],
        final=_MODEL_TITLES[_final(metrics)],
        metrics=metrics,
        ledger=findings.ledger,
        comparison=findings.comparison,
        judge=findings.judge,
        judged=_judged(findings.items, metrics),
        worst=_worst(findings.items, metrics),
        harness=findings.harness,
        tested=_tested(metrics, findings.harness),
        transition_titles={**_TRANSITIONS, "merged": f"{_MODEL_TITLES[_final(metrics)]} adapter → final merged model"},
        groups=[(title, _below(metrics, prefix)) for prefix, title in _GROUP_TITLES.items() if _below(metrics, prefix)],
        formats=_below(metrics, "format"),
        languages={name: rate for name, rate in _below(metrics, "language").items() if "." not in name},
    )


def _final(metrics: dict[str, float]) -> str:
    """Name of the final merged model, by what was measured."""
    return last_merged([name for name in MODELS if f"exact.{name}" in metrics])


def _judged(items: Sequence[Item], metrics: dict[str, float]) -> list[tuple[str, float | None, int, int]]:
    """Title, mean score, answers with a score and answers without one of each judged model."""
    rows = []
    for name in MODELS:
        told = [answer.judgement for item in items if (answer := item.models.get(name)) is not None and answer.judgement is not None]
        scored = sum(judgement.score is not None for judgement in told)
        if told:
            rows.append((_MODEL_TITLES[name], metrics.get(f"judge.score.{name}"), scored, len(told) - scored))
    return rows


def _worst(items: Sequence[Item], metrics: dict[str, float]) -> list[tuple[Item, str, Judgement]]:
    """The answers of the served model that the judge scored lowest, with its reasons; none that has full marks."""
    served = next((name for name in reversed(MODELS) if f"judge.judged.{name}" in metrics), "")
    answered = [(item, item.models[served]) for item in items if served in item.models]
    scored = [(item, answer.answer, told) for item, answer in answered if (told := answer.judgement) is not None and told.score is not None]
    low = sorted(scored, key=lambda row: row[2].score or 0.0)[:_WORST]
    return [row for row in low if row[2].score != 1]


def _tested(metrics: dict[str, float], found: Mapping[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Task, figure, value and standard error of each figure of lm-evaluation-harness."""
    figures = _below(metrics, "harness") if found else {}
    rows = []
    for name, value in figures.items():
        task, _, told = name.partition(".")
        if "_stderr" not in told:
            rows.append((task, told, value, figures.get(f"{task}.{told}_stderr")))
    return rows


def figure(value: float | None) -> str:
    """A number with four significant figures; ``not measured`` for None."""
    if value is None:
        return "not measured"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def percent(value: float) -> str:
    return f"{value * 100:.1f} %"


def change(value: float) -> str:
    """A relative change with its sign, in per cent."""
    return f"{value * 100:+.2f} %"


def _bound(gate: Any) -> str:
    parts = [f"≥ {figure(gate.min)}" if gate.min is not None else "", f"≤ {figure(gate.max)}" if gate.max is not None else ""]
    return " and ".join(part for part in parts if part)


def _below(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    return {name[len(prefix) + 1 :]: value for name, value in metrics.items() if name.startswith(f"{prefix}.")}


def _headlines(metrics: dict[str, float]) -> list[Headline]:
    headlines: list[Headline] = []
    if "dapt.perplexity_reduction" in metrics:
        note = f"{percent(metrics['dapt.perplexity_reduction'])} lower on held-out books"
        headlines.append(_change("Perplexity", metrics, "perplexity.base", "perplexity.dapt", note=note))
    headlines.append(
        _change(
            "Validation loss", metrics, "sft.validation_loss.before", "sft.validation_loss.after", note="held-out answers, nats per token"
        )
    )
    kinds = f"; mean over kinds {percent(metrics['exact.kinds_mean'])}" if "exact.kinds_mean" in metrics else ""
    final = _final(metrics)
    note = f"held-out questions, base to {_MODEL_TITLES[final]}{kinds}"
    headlines.append(Headline("Exact answers", percent(metrics["exact.base"]), percent(metrics[f"exact.{final}"]), note))
    if "sft.perplexity_change" in metrics:
        note = f"{metrics['sft.perplexity_change'] * 100:+,.0f} % in SFT on held-out books: what DAPT gained and the answers cost"
        headlines.append(_change("Books after SFT", metrics, "perplexity.dapt", "perplexity.sft", note=note))
    if "dpo.exact_change" in metrics:
        headlines.append(_preferences(metrics))
    if "quantize.perplexity_increase" in metrics:
        size = metrics["size.quantized_bytes"] / metrics["size.merged_bytes"]
        note = f"{change(metrics['quantize.perplexity_increase'])} perplexity, {percent(size)} of the size"
        headlines.append(Headline("Eight bits", percent(metrics[f"exact.{final}"]), percent(metrics["exact.quantized"]), note))
    return headlines


def _preferences(metrics: dict[str, float]) -> Headline:
    """What DPO learnt, and what it did to the exact answers."""
    learnt = (
        f"better answers gained more in {percent(metrics['dpo.reward_accuracy'])} of the pairs; "
        if "dpo.reward_accuracy" in metrics
        else ""
    )
    note = f"DPO loss on held-out pairs; {learnt}exact answers {metrics['dpo.exact_change'] * 100:+.1f} points"
    return _change("Preferences", metrics, "dpo.validation_loss.before", "dpo.validation_loss.after", note=note)


def _change(title: str, metrics: dict[str, float], before: str, after: str, *, note: str) -> Headline:
    return Headline(title, figure(metrics.get(before)), figure(metrics.get(after)), note)
