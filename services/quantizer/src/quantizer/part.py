"""A stretch of a stage's progress: what works in it reports steps of its own count, watchers see one bar that only grows."""

from __future__ import annotations

from typing import Any

from parampara.progress import Level, Progress

_WHOLE = 1000
"""Steps of the whole bar."""


class Part:
    """The part of ``progress`` from ``begin`` to ``end``, as fractions of the whole."""

    def __init__(self, progress: Progress, *, begin: float = 0.0, end: float = 1.0) -> None:
        self._progress, self._begin, self._end = progress, begin, end

    def within(self, begin: float, end: float) -> Part:
        """A part of this part."""
        length = self._end - self._begin
        return Part(self._progress, begin=self._begin + begin * length, end=self._begin + end * length)

    def phase(self, name: str) -> None:
        self._progress.phase(name)

    def step(self, step: int, total: int, **metrics: float) -> None:
        fraction = min(step / total, 1.0) if total else 1.0
        self._progress.step(round(_WHOLE * (self._begin + fraction * (self._end - self._begin))), _WHOLE, **metrics)

    def event(self, message: str, *, level: Level = "info", **data: Any) -> None:
        self._progress.event(message, level=level, **data)
