"""How a starting stack looks: one live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.table import Table

from standalone.processes import Child

_STYLES = {"waiting": "dim", "starting": "yellow", "ready": "green", "restarting": "red", "stopped": "dim"}


class StackDisplay:
    """Shows the children of a stack until :meth:`close`; afterwards only notes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._told: dict[str, str] = {}
        if self._live is not None:
            self._live.start()

    def update(self, children: list[Child]) -> None:
        if self._live is not None:
            self._live.update(_table(children))
            return
        for child in children:
            if self._told.get(child.spec.name) != child.state and child.state in ("ready", "restarting"):
                self._console.print(f"  {child.spec.name:<14} {child.state:<10} {child.spec.where}", highlight=False, markup=False)
            self._told[child.spec.name] = child.state

    def note(self, text: str) -> None:
        self._console.print(f"  {text}", highlight=False, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _table(children: list[Child]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("process", "state", "pid", "seconds", "address"):
        table.add_column(name, justify="right" if name in ("pid", "seconds") else "left")
    for child in children:
        state = f"[{_STYLES[child.state]}]{child.state}[/]"
        table.add_row(child.spec.name, state, str(child.pid or ""), f"{child.seconds:.0f}", child.spec.where)
    return table
