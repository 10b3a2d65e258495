"""Follows a stage's ``progress.jsonl`` and folds it into the job's progress and its events."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parampara.db.storable import storable

_LONGEST_MESSAGE = 2000


class ProgressTail:
    """New lines of a file that another process appends to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch()
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):  # a killed attempt left half a line: close it, or it spoils the next one
            with path.open("ab") as file:
                file.write(b"\n")
        self._offset = path.stat().st_size
        self._rest = b""

    def read(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield storable(record)


class ProgressBook:
    """The newest progress, and the events that are not yet written to the database.

    Metrics are collected into one event per flush, which carries every step since the last: the table grows by at most one
    row a second and still holds the whole curve.
    """

    def __init__(self, earlier: dict[str, Any]) -> None:
        self.progress: dict[str, Any] = {**earlier}
        self._events: list[dict[str, Any]] = []
        self._points: list[dict[str, Any]] = []
        self._first: tuple[float, int] | None = None
        self.changed = False

    def fold(self, record: dict[str, Any]) -> None:
        """Take in one line; one that lacks what its type has to have is passed over."""
        try:
            self._fold(record)
        except (KeyError, TypeError, ValueError, OverflowError):
            return
        self.changed = True

    def _fold(self, record: dict[str, Any]) -> None:
        match record.get("type"):
            case "phase":
                self._phase(str(record["phase"]))
            case "step":
                self._step(float(record["t"]), int(record["step"]), int(record["total"]), dict(record.get("metrics") or {}))
            case "event":
                level = record.get("level") if record.get("level") in ("info", "warn", "error") else "info"
                self._event("message", str(level), str(record.get("message", "")), dict(record.get("data") or {}))

    def pending(self) -> list[dict[str, Any]]:
        """Events to write, in order; they stay pending until :meth:`written`."""
        self._close_points()
        return self._events

    def written(self) -> None:
        self._events = []
        self.changed = False

    def _phase(self, name: str) -> None:
        self._close_points()
        self._first = None
        self.progress = {**self._kept(), "phase": name, "step": 0, "total": 0, "metrics": {}, "eta_seconds": None}
        self._event("message", "info", name, {"phase": name})

    def _step(self, t: float, step: int, total: int, metrics: dict[str, Any]) -> None:
        first_time, first_step = self._first = self._first or (t, step)
        eta = (t - first_time) / (step - first_step) * (total - step) if step > first_step else None
        best = max(step, self.progress.get("best_step", 0))
        shown = {**self.progress.get("metrics", {}), **metrics}
        self.progress = {
            **self.progress,
            "step": step,
            "total": total,
            "metrics": shown,
            "eta_seconds": round(eta, 1) if eta is not None and math.isfinite(eta) else None,
            "best_step": best,
        }
        self._points.append({"step": step, "metrics": metrics})

    def _close_points(self) -> None:
        if self._points:
            step, total = self.progress["step"], self.progress["total"]
            data = {"step": step, "total": total, "metrics": self.progress["metrics"], "points": self._points}
            self._event("metrics", "info", f"step {step}/{total}", data)
            self._points = []

    def _event(self, type: str, level: str, message: str, data: dict[str, Any]) -> None:
        if type != "metrics":
            self._close_points()
        self._events.append({"type": type, "level": level, "message": message[:_LONGEST_MESSAGE], "data": data})

    def _kept(self) -> dict[str, Any]:
        return {key: self.progress[key] for key in ("best_step", "crash_step") if key in self.progress}
