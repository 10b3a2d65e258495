"""What the demo tells at the end: a table on the terminal, ``report.json`` and a self-contained ``report.html``."""

from __future__ import annotations

import json
import platform as machine
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from rich.console import Console
from rich.table import Table

from parampara.schemas.metrics import MODELS, last_merged
from parampara.storage import write_atomically
from standalone.asking import Answer
from standalone.client import Platform
from standalone.demo.curves import curve
from standalone.follow import duration, seconds_of

TRAINED = ("dapt", "sft", "dpo")


def collect(
    platform: Platform, run: dict[str, Any], *, answers: Sequence[Answer], timings: dict[str, float], recipe: str, store: str
) -> dict[str, Any]:
    """Everything the report holds, as JSON."""
    jobs = {job["name"]: job for job in run["jobs"]}
    evaluation, deployment = (jobs[name]["result"] or {} for name in ("evaluate", "deploy"))
    return {
        "run": run["id"],
        "recipe": recipe,
        "model": run["model"],
        "base_model": run["recipe"]["base_model"],
        "alias": run["alias"],
        "gate": run["gate"],
        "base_url": platform.base_url,
        "vector_store": store,
        "machine": f"{machine.machine()}, {machine.system()}, Python {machine.python_version()}",
        "timings": timings,
        "stages": [stage_row(job, evaluation.get("metrics", {})) for job in run["jobs"]],
        "curves": {name: _points(platform, jobs[name]) for name in TRAINED if name in jobs},
        "metrics": {**evaluation.get("metrics", {}), **deployment.get("metrics", {})},
        "gates": run["gates"],
        "samples": evaluation.get("samples", []),
        "results": {name: job["result"] for name, job in jobs.items() if name != "evaluate"},
        "answers": [answer.model_dump() for answer in answers],
    }


def stage_row(job: dict[str, Any], metrics: dict[str, float]) -> dict[str, Any]:
    """One line of the summary: stage, time, its key figure before and after, artifact."""
    result = job["result"] or {}
    return {
        "stage": job["name"],
        "status": job["status"],
        "seconds": seconds_of(job),
        "reused": bool(job["reused_from"]),
        "figure": _figure(job["kind"], result, metrics),
        "artifact": job["artifact_id"],
    }


def remove(folder: Path) -> None:
    """What an earlier demo told; it must not pass for the story of one that fails."""
    for name in ("report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def write(told: dict[str, Any], folder: Path) -> Path:
    """Write both files and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "report.json", json.dumps(told, indent=1, ensure_ascii=False).encode())
    environment = Environment(loader=PackageLoader("standalone.demo", "templates"), autoescape=True)
    environment.filters["duration"] = duration
    curves = {name: curve(points, title=f"{name.upper()}: loss by step") for name, points in told["curves"].items()}
    answered = {name for sample in told["samples"] for name in sample["answers"]}
    columns = sorted(answered, key=lambda name: (MODELS.index(name) if name in MODELS else len(MODELS), name))
    page = environment.get_template("report.html.j2").render(**{**told, "curves": curves}, parity=_parity(told["metrics"]), columns=columns)
    write_atomically(folder / "report.html", page.encode())
    return folder / "report.html"


def show(told: dict[str, Any], console: Console) -> None:
    """The summary table."""
    table = Table(title="\nThe line", title_justify="left", box=None, pad_edge=False)
    for name, side in (("stage", "left"), ("time", "right"), ("key figure, before → after", "left"), ("artifact", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for row in told["stages"]:
        time_text = "reused" if row["reused"] else duration(row["seconds"])
        table.add_row(row["stage"], time_text, row["figure"], (row["artifact"] or "").removeprefix("sha256:")[:12])
    console.print(table)
    passed = sum(gate["passed"] for gate in told["gates"])
    gates = f"gates {passed} of {len(told['gates'])} passed: {told['gate']}"
    console.print(f"\n  model    {told['model']} (alias {told['alias']}), {gates}", highlight=False, soft_wrap=True)
    parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in told["timings"].items())
    console.print(f"  time     {parts}", highlight=False, soft_wrap=True)


def show_answer(answer: Answer, console: Console) -> None:
    """Answer, whether it is the computed fact, and what it cites."""
    for line in answer.text.strip().splitlines():
        console.print(f"    {line}", highlight=False, markup=False)
    verdict = {True: "equals the computed fact", False: f"the computed fact is: {answer.question.expected}", None: ""}[answer.matches]
    console.print(f"    ({answer.model}, {answer.seconds:.1f} s; {verdict})", style="dim", highlight=False, markup=False)
    cited = [citation for citation in answer.citations if citation.cited]
    for citation in cited:
        by = f", attributed by the {citation.attributed_by}" if citation.attributed_by == "gateway" else ""
        console.print(f"    {citation.marker} {citation.title}{by}: {citation.text[:110]}…", style="cyan", highlight=False, markup=False)
    if not cited:
        console.print(f"    {len(answer.citations)} passages were retrieved, none of them is cited", style="dim", highlight=False)


def _points(platform: Platform, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Step and losses of a training job; a reused one shows the curve of the job that did the work."""
    source = job["reused_from"] or job["id"]
    rows = platform.get(f"/jobs/{source}/metrics", points=1000)["data"]
    return [{"step": row["step"], **row["metrics"]} for row in rows]


def _figure(kind: str, result: dict[str, Any], metrics: dict[str, float]) -> str:
    if not result:
        return ""
    match kind:
        case "dapt":
            return f"perplexity {result['perplexity_before']:.1f} → {result['perplexity_after']:.1f} ({result['backend']})"
        case "sft":
            return f"validation loss {result['validation_loss_before']:.3f} → {result['validation_loss_after']:.3f} ({result['backend']})"
        case "dpo":
            return _preferred(result)
        case "merge":
            return f"{result['merged_tensors']} of {result['tensors']} tensors merged, {result['dtype']}"
        case "quantize":
            return f"{result['parent_bytes'] / 1e6:.1f} → {result['bytes'] / 1e6:.1f} MB ({result['scheme']})"
        case "evaluate":
            return _evaluated(metrics)
        case "deploy":
            return _deployed(result)
    return ""


def _preferred(result: dict[str, Any]) -> str:
    """How often and by how much the better answer gained more than the worse one, where the stage says so; a loss of pairs tells little."""
    parts = [f"loss of pairs {result['validation_loss_before']:.3f} → {result['validation_loss_after']:.3f}"]
    if (accuracy := result.get("reward_accuracy")) is not None:
        parts.append(f"better answers preferred in {accuracy:.0%}")
    if (margin := result.get("reward_margin")) is not None:
        parts.append(f"margin {margin:.2f}")
    return f"{', '.join(parts)} ({result['backend']})"


def _deployed(result: dict[str, Any]) -> str:
    """When it answered, how fast it writes, and how well it agrees with the model that was evaluated."""
    metrics = result.get("metrics", {})
    parts = [f"answered after {result['ready_seconds']:.0f} s"]
    if (top1 := metrics.get("parity.live.top1")) is not None:
        parts.append(f"same top token as evaluated {top1:.1%}")
    if (rate := metrics.get("serving.tokens_per_second")) is not None:
        parts.append(f"{rate:.0f} tokens/s")
    return ", ".join(parts)


def _evaluated(metrics: dict[str, float]) -> str:
    """Exact answers overall and as the mean of all kinds, and what SFT did to the perplexity of the books that DAPT had taught."""
    merged = last_merged([name for name in MODELS if f"exact.{name}" in metrics])
    base, last = metrics.get("exact.base"), metrics.get("exact.quantized", metrics.get(f"exact.{merged}"))
    parts = [f"exact answers {base:.0%} → {last:.0%}"] if base is not None and last is not None else []
    if (kinds := metrics.get("exact.kinds_mean")) is not None:
        parts.append(f"mean of kinds {kinds:.0%}")
    if "dpo.exact_change" in metrics:
        parts.append(f"{metrics['dpo.exact_change'] * 100:+.0f} points in DPO")
    if "sft.perplexity_change" in metrics:
        parts.append(f"perplexity of books in SFT {metrics['perplexity.dapt']:.0f} → {metrics['perplexity.sft']:.0f}")
    return ", ".join(parts)


def _parity(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """``parity.<transition>.<figure>`` metrics as one row per transition."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        if name.startswith("parity.") and name.count(".") >= 2:
            transition, figure = name.removeprefix("parity.").rsplit(".", 1)
            rows.setdefault(transition, {"transition": transition})[figure] = value
    return list(rows.values())
