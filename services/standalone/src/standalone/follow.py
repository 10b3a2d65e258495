"""Follow a run: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from parampara.errors import Unavailable
from standalone.client import Platform

POLL_SECONDS = 0.5
LINE_SECONDS = 5.0
"""Without a terminal: at most one line per stage in this time."""
_AWAY_SECONDS = 120.0
_ENDED = ("succeeded", "failed", "cancelled")
_MARKS = {"succeeded": "[green]✓[/]", "failed": "[red]✗[/]", "cancelled": "[dim]–[/]", "running": "[yellow]●[/]"}


def follow(platform: Platform, run_id: str, console: Console) -> dict[str, Any]:
    """Show run ``run_id`` until it has ended and return its last state.

    A gateway that is away for a while is waited for: the run goes on without it.

    Raises:
        Unavailable: the gateway was away for two minutes.
    """
    view: _Lines | _Table = _Table(console) if console.is_terminal else _Lines(console)
    seen = time.monotonic()
    with view:
        while True:
            run = None
            try:
                run = platform.get(f"/runs/{run_id}")
                seen = time.monotonic()
            except Unavailable:
                if time.monotonic() - seen > _AWAY_SECONDS:
                    raise
            if run is not None:
                view.show(run)
                if run["status"] in _ENDED:
                    return run
            time.sleep(POLL_SECONDS)


def seconds_of(job: dict[str, Any]) -> float | None:
    """How long a job has run, or ran."""
    if job["started_at"] is None:
        return None
    return max(0.0, (job["finished_at"] or time.time()) - job["started_at"])


def duration(seconds: float | None) -> str:
    """``75`` as ``1:15``."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def doing(job: dict[str, Any]) -> str:
    """What a job does just now, in a few words."""
    if job["status"] == "failed":
        return str((job["error"] or {}).get("message", "failed"))
    if job["reused_from"]:
        return "reused"
    progress = job["progress"]
    metrics = {key: value for key, value in progress["metrics"].items() if value is not None}
    parts = [progress["phase"] or ""] if job["status"] == "running" else []
    if job["status"] == "running" and progress["total"]:
        parts.append(f"{progress['step']}/{progress['total']}")
    if (loss := metrics.get("loss", metrics.get("train_loss"))) is not None:
        parts.append(f"loss {loss:.3f}")
    if (rate := metrics.get("tokens_per_s", metrics.get("tokens_per_second"))) is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if (share := metrics.get("mfu")) is not None:
        parts.append(f"{share:.0%} MFU")
    if (memory := metrics.get("peak_memory_bytes")) is not None:
        parts.append(f"{memory / 1e9:.1f} GB")
    if (cost := metrics.get("cost")) is not None:
        parts.append(f"cost {cost:.2f}")
    return "  ".join(part for part in parts if part)


class _Table:
    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> _Table:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, run: dict[str, Any]) -> None:
        table = Table(box=None, pad_edge=False)
        for name, side in (("", "left"), ("stage", "left"), ("", "left"), ("time", "right"), ("left", "right"), ("", "left")):
            table.add_column(name, justify=side)  # type: ignore[arg-type]
        for job in run["jobs"]:
            done, total = _steps(job)
            bar = ProgressBar(total=total, completed=done, width=24) if job["status"] in ("running", "succeeded") else Text("")
            left = duration(job["eta_seconds"]) if job["status"] == "running" else ""
            table.add_row(
                _MARKS.get(job["status"], " "), job["name"], bar, duration(seconds_of(job)), left, Text(doing(job), overflow="ellipsis")
            )
        left = f", about {duration(run['eta_seconds'])} left" if run["eta_seconds"] is not None else ""
        self._live.update(Group(Text(f"run {run['id']}  {run['status']}  {run['progress']:.0%}{left}", style="bold"), table))


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._told: dict[str, tuple[str, str | None]] = {}
        self._at: dict[str, float] = {}

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def show(self, run: dict[str, Any]) -> None:
        for job in run["jobs"]:
            if job["status"] in ("waiting", "queued"):
                continue
            now = (job["status"], job["progress"]["phase"] if job["status"] == "running" else None)
            news = self._told.get(job["name"]) != now
            if not news and (job["status"] != "running" or time.monotonic() - self._at.get(job["name"], 0.0) < LINE_SECONDS):
                continue
            line = f"  {duration(seconds_of(job)):>6}  {job['name']:<10}  {job['status']:<9}  {doing(job)}"
            if job["status"] == "running" and job["eta_seconds"] is not None:
                line += f"  {duration(job['eta_seconds'])} left"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._told[job["name"]] = now
            self._at[job["name"]] = time.monotonic()


def _steps(job: dict[str, Any]) -> tuple[float, float]:
    if job["status"] == "succeeded":
        return 1.0, 1.0
    with contextlib.suppress(TypeError):
        return float(job["progress"]["step"]), float(job["progress"]["total"])
    return 0.0, 1.0
