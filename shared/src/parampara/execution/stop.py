"""The wish to stop, seen by stage loops: they poll :func:`requested`, checkpoint, and raise ``errors.Preempted``.

Imports nothing heavy, so that a stage function stays usable without any of the job protocol: nobody asks it to stop then.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_event = threading.Event()


def request() -> None:
    """Ask the running stage to checkpoint and stop."""
    _event.set()


def requested() -> bool:
    return _event.is_set()


def clear() -> None:
    """Forget an earlier request; for processes (and tests) that run one stage after another."""
    _event.clear()


def install_handler() -> None:
    """Make SIGTERM and SIGINT request a stop. Only the main thread may call this."""
    signal.signal(signal.SIGTERM, _on_signal)
    signal.signal(signal.SIGINT, _on_signal)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if _event.is_set() and signum == signal.SIGINT:
        raise KeyboardInterrupt  # a second Ctrl-C at a terminal means now
    _event.set()
