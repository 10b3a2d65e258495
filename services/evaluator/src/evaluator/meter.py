"""One progress count over a whole evaluation, and the place where a wish to stop is seen."""

from __future__ import annotations

from parampara.errors import Preempted
from parampara.execution import stop
from parampara.progress import Progress


class Meter:
    """Counts work items (sequences and questions) of all models together, so that the time left can be told.

    Every method raises :class:`Preempted` when the stage was asked to stop: an evaluation keeps no checkpoint, the next
    attempt measures again.
    """

    def __init__(self, progress: Progress, *, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def phase(self, name: str) -> None:
        self.check()
        self._progress.phase(name)

    def advance(self, items: int, **metrics: float) -> None:
        self._done += items
        self._progress.step(min(self._done, self._total), self._total, **metrics)
        self.check()

    def warn(self, message: str) -> None:
        self._progress.event(message, level="warn")

    def check(self) -> None:
        if stop.requested():
            raise Preempted("Asked to stop during evaluation; the next attempt measures again.")
