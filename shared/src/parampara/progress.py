"""How a stage function tells the outside what it is doing.

A stage appends JSON lines to ``<workdir>/progress.jsonl``; whoever watches (the worker, a terminal, a test) tails the file.
A file and not a pipe: it survives the death of the watcher, and a run directory stays readable by any tool.

Line forms, ``t`` in Unix seconds::

    {"type": "phase", "t": 0.0, "phase": "load model"}
    {"type": "step", "t": 0.0, "step": 3, "total": 120, "metrics": {"loss": 2.1, "tokens_per_s": 810.0}}
    {"type": "event", "t": 0.0, "level": "info", "message": "...", "data": {}}
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Literal, Protocol

Level = Literal["info", "warn", "error"]


class Progress(Protocol):
    """What every stage function accepts as ``progress``."""

    def phase(self, name: str) -> None: ...

    def step(self, step: int, total: int, **metrics: float) -> None: ...

    def event(self, message: str, *, level: Level = "info", **data: Any) -> None: ...


class SilentProgress:
    """Forgets everything; for callers that only want the result."""

    def phase(self, name: str) -> None:
        return

    def step(self, step: int, total: int, **metrics: float) -> None:
        return

    def event(self, message: str, *, level: Level = "info", **data: Any) -> None:
        return


class JsonlProgress:
    """Appends each report to a JSON-lines file, one ``write`` per line, so a reader never sees half a record twice."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def phase(self, name: str) -> None:
        self._write(type="phase", phase=name)

    def step(self, step: int, total: int, **metrics: float) -> None:
        # JSON has no NaN: a value that is not finite is told as null, never as a number
        kept = {key: (value if math.isfinite(value) else None) for key, value in metrics.items()}
        self._write(type="step", step=step, total=total, metrics=kept)

    def event(self, message: str, *, level: Level = "info", **data: Any) -> None:
        self._write(type="event", level=level, message=message, data=data)

    def _write(self, **record: Any) -> None:
        self._file.write(json.dumps({"t": time.time(), **record}, default=str, allow_nan=False) + "\n")
