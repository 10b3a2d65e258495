"""Worker processes to be killed, on the queue of tests/shared/execution."""

from __future__ import annotations

from tests.shared.execution.conftest import queue, settings
from tests.shared.execution.test_worker import start_worker

__all__ = ["queue", "settings", "start_worker"]
