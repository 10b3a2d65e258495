"""A stack in the background, for as long as the demo needs it."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from types import TracebackType

from rich.console import Console

from standalone import state
from standalone.places import Places
from standalone.processes import Child, Spec
from standalone.stack import START_SECONDS, StackFailed

STOP_SECONDS = 120.0


class Background:
    """``parampara up`` as a child process; leaving the context stops it and everything it started."""

    def __init__(self, places: Places, *, auto_ports: bool) -> None:
        self._places = places
        command = [sys.executable, "-m", "standalone", "up", *(["--auto-ports"] if auto_ports else [])]
        # SIGTERM is what `up` answers by stopping all it started; the kernel sends it when the demo itself is killed
        spec = Spec("up", command, lambda: False, environment={"PARAMPARA_HOME": str(places.home)}, stop_seconds=STOP_SECONDS)
        self._child = Child(spec, log=places.logs / "up.log")

    def __enter__(self) -> Background:
        self._child.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # a second Ctrl-C must not leave the stack half stopped
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._child.ask_to_stop()
            self._child.stop()
        finally:
            signal.signal(signal.SIGINT, before)

    def wait_ready(self, console: Console) -> state.StackState:
        """Wait until every process of the stack is ready, telling which ones are.

        Raises:
            StackFailed: `up` ended, or took too long; with the end of its log.
        """
        deadline = time.monotonic() + 2 * START_SECONDS
        spinner = console.status("starting the stack") if console.is_terminal else contextlib.nullcontext()
        with spinner as shown:
            while time.monotonic() < deadline:
                if self._child.pid is None:
                    raise StackFailed(f"The stack did not start:\n{self._child.tail(25)}")
                current = state.load(self._places)
                if current is not None and current.pid == self._child.pid:
                    if current.status == "ready":
                        return current
                    ready = [record.name for record in current.processes if record.state == "ready"]
                    late = [record.name for record in current.processes if record.state != "ready"]
                    if shown is not None:
                        shown.update(f"starting the stack: {len(ready)} ready, waiting for {', '.join(late)}")
                time.sleep(0.2)
        raise StackFailed(f"The stack was not ready in time:\n{self._child.tail(25)}")
