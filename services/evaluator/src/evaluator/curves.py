"""Loss curves of the training stages, read from their adapter directories and drawn as inline SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 520, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 34
_MAX_POINTS = 400
_TRAIN_KEYS = ("loss", "train_loss")
_VALIDATION_KEYS = ("validation_loss", "eval_loss")

Point = tuple[float, float]
"""(step, loss)."""


@dataclass(frozen=True)
class Curve:
    title: str
    train: list[Point]
    validation: list[Point]
    note: str = ""
    """How it was trained, how fast and at what cost; empty where the adapter does not say."""


def read_curves(*, dapt: Path | None = None, sft: Path | None = None, dpo: Path | None = None) -> list[Curve]:
    """Curves of the adapters that have a history: ``metrics.jsonl``, one ``{"step", "loss", ...}`` per line.

    The validation loss before and after training comes from ``training.json`` where the history holds none.
    """
    adapters = {"DAPT: loss on books": dapt, "SFT: loss on answers": sft, "DPO: loss on preferences": dpo}
    curves = [_read(title, directory) for title, directory in adapters.items() if directory is not None]
    return [curve for curve in curves if len(curve.train) > 1 or len(curve.validation) > 1]


def preference_metrics(adapter: Path) -> dict[str, float]:
    """What stage dpo measured on held-out pairs, from the adapter's ``training.json``; what that does not say is left out."""
    summary = _json(adapter / "training.json")
    told = {
        "dpo.validation_loss.before": summary.get("validation_loss_before"),
        "dpo.validation_loss.after": summary.get("validation_loss_after"),
        "dpo.reward_accuracy": summary.get("reward_accuracy"),
        "dpo.reward_margin": summary.get("reward_margin"),
    }
    return {name: value for name, given in told.items() if (value := _finite(given)) is not None}


def draw(curve: Curve) -> Markup:
    """A self-contained ``<svg>`` of the curve; colours come from the page's style sheet."""
    points = curve.train + curve.validation
    steps = (min(step for step, _ in points), max(step for step, _ in points))
    ticks = _ticks(min(loss for _, loss in points), max(loss for _, loss in points))
    across = _Scale(steps, (_LEFT, _WIDTH - _RIGHT))
    down = _Scale((ticks[0], ticks[-1]), (_HEIGHT - _BOTTOM, _TOP))
    parts = [Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, curve.title)]
    for tick in ticks:
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{y}" y2="{y}"/>').format(_LEFT, _WIDTH - _RIGHT, y=down(tick)))
        parts.append(Markup('<text class="tick" text-anchor="end" x="{}" y="{}">{:g}</text>').format(_LEFT - 7, down(tick) + 4, tick))
    for step in _step_ticks(steps):
        parts.append(Markup('<text class="tick" text-anchor="middle" x="{}" y="{}">{:g}</text>').format(across(step), _HEIGHT - 16, step))
    parts.append(
        Markup('<text class="tick" text-anchor="middle" x="{}" y="{}">step</text>').format((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 2)
    )
    parts.append(_polyline("train", _thinned(curve.train), across, down))
    parts.append(_polyline("validation", curve.validation, across, down))
    for step, loss in curve.validation:
        parts.append(Markup('<circle class="validation" r="3.5" cx="{}" cy="{}"/>').format(across(step), down(loss)))
    return Markup("").join([*parts, Markup("</svg>")])


@dataclass(frozen=True)
class _Scale:
    values: tuple[float, float]
    pixels: tuple[float, float]

    def __call__(self, value: float) -> float:
        low, high = self.values
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.pixels[0] + share * (self.pixels[1] - self.pixels[0]), 1)


def _read(title: str, directory: Path) -> Curve:
    rows = _history(directory / "metrics.jsonl")
    train, validation = _series(rows, _TRAIN_KEYS), _series(rows, _VALIDATION_KEYS)
    summary = _json(directory / "training.json")
    if train and len(validation) < 2:
        ends = [(train[0][0], summary.get("validation_loss_before")), (train[-1][0], summary.get("validation_loss_after"))]
        validation = [(step, loss) for step, value in ends if (loss := _finite(value)) is not None]
    return Curve(title=title, train=train, validation=validation, note=_note(summary))


def _note(summary: dict[str, Any]) -> str:
    """From ``training.json``: ``trl, base in nf4, 140 steps, 8,100 tokens/s, 41 % of the device's peak, 22.1 GB, cost 1.35``."""
    full = summary.get("params", {}).get("lora", "") is None
    shown = (
        ("backend", "{}"),
        ("trained_in", "every weight trained, in {}" if full else "base in {}"),
        ("steps", "{:,} steps"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "{:.0%} of the device's peak"),
        ("cost", "cost {:.2f}"),
    )
    parts = [text.format(summary[key]) for key, text in shown if summary.get(key)]
    if memory := summary.get("peak_memory_bytes"):
        parts.append(f"peak memory {memory / 1e9:.1f} GB")
    return ", ".join(parts)


def _history(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{**row, **row["metrics"]} if isinstance(row.get("metrics"), dict) else row for row in rows if isinstance(row, dict)]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _series(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[Point]:
    """Finite values by step; a step that was run again after a resume counts once, with its last value."""
    found: dict[float, float] = {}
    for row in rows:
        step = _finite(row.get("step"))
        for value in (_finite(row.get(key)) for key in keys):
            if step is not None and value is not None:
                found[step] = value
    return sorted(found.items())


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that enclose the range."""
    spread = max(high - low, abs(high) * 0.01, 1e-6)
    magnitude = 10 ** math.floor(math.log10(spread / 4))
    step = next(magnitude * factor for factor in (1, 2, 2.5, 5, 10) if spread / (magnitude * factor) <= 5)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(index * step, 10) for index in range(first, last + 1)]


def _step_ticks(steps: tuple[float, float]) -> list[float]:
    low, high = steps
    return sorted({round(low + (high - low) * quarter / 4) for quarter in range(5)})


def _thinned(points: list[Point]) -> list[Point]:
    """Means of equal runs of points, so that a long history draws no more than a few hundred."""
    run = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + run] for start in range(0, len(points), max(run, 1))]
    return [(sum(step for step, _ in group) / len(group), sum(loss for _, loss in group) / len(group)) for group in groups]


def _polyline(name: str, points: list[Point], across: _Scale, down: _Scale) -> Markup:
    places = " ".join(f"{across(step)},{down(loss)}" for step, loss in points)
    return Markup('<polyline class="{}" points="{}"/>').format(name, escape(places))
