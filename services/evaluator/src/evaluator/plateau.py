"""Has the validation loss settled? Read from the curve that the trainer leaves, so nothing is measured again.

The trend is the slope of the curve over the last third of training, by the median of the slopes between all pairs of points
(Theil 1950, Sen 1968: one outlier does not turn it), times that third's length, as a share of the loss at its beginning. -0.05
means that the loss still fell by five per cent in the last third: train longer. +0.05 means that it rose: the model forgets what
it could answer. Near 0 is the plateau.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from statistics import median

from evaluator.curves import Point

MIN_POINTS = 3
"""In the last third; two points make a line, not a trend."""


def trend(points: Sequence[Point]) -> float | None:
    """Relative change of the loss over the last third of ``(step, loss)``, in order of steps; None if it holds too few points."""
    if not points:
        return None
    first, last = points[0][0], points[-1][0]
    start = last - (last - first) / 3
    window = [point for point in points if point[0] >= start]
    if len(window) < MIN_POINTS:
        return None
    slope = median((after[1] - before[1]) / (after[0] - before[0]) for before, after in combinations(window, 2))
    level = median(loss - slope * (step - start) for step, loss in window)
    return slope * (last - start) / level if level > 0 else None


def above_best(points: Sequence[Point]) -> float | None:
    """How much higher the loss ends than its lowest point was, as a share of that: the cost of training on. None without points."""
    if not points or (best := min(loss for _, loss in points)) <= 0:
        return None
    return points[-1][1] / best - 1


def metrics(points: Sequence[Point]) -> dict[str, float]:
    figures = {"trend": trend(points), "above_best": above_best(points) if len(points) >= MIN_POINTS else None}
    return {f"sft.validation_loss.{name}": value for name, value in figures.items() if value is not None}
