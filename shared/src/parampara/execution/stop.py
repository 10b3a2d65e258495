"""The wish to stop, seen by stage loops: they poll :func:`requested`, checkpoint, and raise ``errors.Preempted``.

While there is nothing to save yet (imports, reading data, loading a model), :func:`interruptible` stops at once.

Imports nothing heavy, so that a stage function stays usable without any of the job protocol: nobody asks it to stop then.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from parampara.errors import Preempted

_event = threading.Event()
_where: str | None = None
"""What the block of :func:`interruptible` does that runs now."""


def request() -> None:
    """Ask the running stage to checkpoint and stop."""
    _event.set()


def requested() -> bool:
    return _event.is_set()


def clear() -> None:
    """Forget an earlier request; for processes (and tests) that run one stage after another."""
    _event.clear()


@contextmanager
def interruptible(where: str) -> Iterator[None]:
    """A block that a signal ends between two instructions of Python, wherever they are; ``where`` completes "Stopped ...".

    A library that swallows the exception costs no more than time: the wish stays, and whoever polls next sees it.

    Raises:
        Preempted: a stop was asked for before or within the block.
    """
    global _where
    if requested():
        raise Preempted(f"Stopped {where}, as asked.")
    _where = where
    try:
        yield
    finally:
        _where = None


def install_handler() -> None:
    """Make SIGTERM and SIGINT request a stop. Only the main thread may call this."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _event.is_set() and signum == signal.SIGINT:
        raise KeyboardInterrupt  # a second Ctrl-C at a terminal means now
    _event.set()
    if _where is not None:
        raise Preempted(f"Stopped {_where}, as asked.")
