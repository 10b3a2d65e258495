"""A loss curve as inline SVG: no script, no library, readable in both colour schemes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 28, 30
_SERIES = {
    "loss": ("train", "var(--a)"),
    "train_loss": ("train", "var(--a)"),
    "eval_loss": ("held out", "var(--b)"),
    "validation_loss": ("held out", "var(--b)"),
}


def curve(points: Sequence[dict[str, Any]], *, title: str) -> Markup:
    """Every known loss in ``points`` (rows with ``step``) over the steps."""
    series = {name: _clean(points, name) for name in _SERIES}
    series = {name: rows for name, rows in series.items() if rows}
    if not series:
        return Markup('<p class="dim">{}: no steps were recorded.</p>').format(title)
    steps = [step for rows in series.values() for step, _ in rows]
    losses = [loss for rows in series.values() for _, loss in rows]
    x0, x1, y0, y1 = min(steps), max(max(steps), min(steps) + 1), min(losses), max(losses)
    margin = (y1 - y0) * 0.05 or 0.05
    y0, y1 = y0 - margin, y1 + margin

    def place(step: float, loss: float) -> tuple[float, float]:
        x = _LEFT + (step - x0) / (x1 - x0) * (WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_TOP + (y1 - loss) / (y1 - y0) * (HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<text x="{_LEFT}" y="16" class="t">{escape(title)}</text>']
    for loss in (y0 + margin, (y0 + y1) / 2, y1 - margin):
        y = place(x0, loss)[1]
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{WIDTH - _RIGHT}" y2="{y}" class="g"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" class="y">{loss:.2f}</text>')
    for step in (x0, (x0 + x1) / 2, x1):
        parts.append(f'<text x="{place(step, y0)[0]}" y="{HEIGHT - 10}" class="x">{step:.0f}</text>')
    for number, (name, rows) in enumerate(series.items()):
        label, colour = _SERIES[name]
        drawn = " ".join(f"{x},{y}" for x, y in (place(step, loss) for step, loss in rows))
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>')
        if len(rows) <= 40:
            parts += [f'<circle cx="{x}" cy="{y}" r="2.4" fill="{colour}"/>' for x, y in (place(step, loss) for step, loss in rows)]
        parts.append(f'<text x="{WIDTH - _RIGHT - 80 * number}" y="16" class="l" style="fill:{colour}">{label}</text>')
    # every value in here is a number or escaped above
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>')


def _clean(points: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    rows = [(float(point["step"]), float(point[name])) for point in points if isinstance(point.get(name), int | float)]
    return [(step, loss) for step, loss in rows if math.isfinite(loss)]
