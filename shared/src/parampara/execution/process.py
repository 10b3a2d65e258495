"""The stage process as its supervisor sees it: started in a session of its own with a scrubbed environment, killable as a group."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from parampara.db.storable import storable
from parampara.execution.child import SUPERVISOR_PID
from parampara.schemas.stages import Kind

_SECRET_NAMES = re.compile(r"^(PARAMPARA_|PG|REDIS|CELERY|AWS_|AZURE_|GOOGLE_)|TOKEN$|SECRET|PASSWORD|API_?KEY|CREDENTIAL|DATABASE_URL")
_TAIL_LINES = 200
_NONE: Mapping[str, str] = MappingProxyType({})
_TAIL_BYTES = 32_768


class StageProcess(ABC):
    """A running stage, wherever it was started; leader of a session of its own."""

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log

    @abstractmethod
    def wait(self, seconds: float) -> int | None:
        """Exit code (-N: killed by signal N), or None when it still runs after ``seconds``."""

    def ask_to_stop(self) -> None:
        """SIGTERM to the stage alone: its helpers must live on until it has written its checkpoint."""
        self._send(signal.SIGTERM)

    def dump_stacks(self) -> None:
        """Have the stage write the stacks of all its threads to its log."""
        self._send(signal.SIGUSR1)

    def kill(self) -> None:
        """SIGKILL to the stage and everything it started that stayed in its session; from any thread, any number of times."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """Last lines of the attempt's log."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            return storable("\n".join(file.read().decode("utf-8", "replace").splitlines()[-_TAIL_LINES:]))

    def _send(self, number: signal.Signals) -> None:
        if self.wait(0) is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class SpawnedStage(StageProcess):
    """``python -m <service> <kind>``. Must be made and waited for by one thread: the process dies with that thread.

    ``secrets`` are added to its scrubbed environment: what this one stage cannot do without.
    """

    def __init__(self, *, service: str, kind: Kind, workdir: Path, log: Path, secrets: Mapping[str, str] = _NONE) -> None:
        with log.open("ab") as file:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", service, kind, "--config", str(workdir / "config.json"), "--workdir", str(workdir)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**stage_environment(), **secrets},
            )
        super().__init__(self._popen.pid, log)

    def wait(self, seconds: float) -> int | None:
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def stage_environment() -> dict[str, str]:
    """This process's environment without settings and secrets, offline, and with the supervisor's pid."""
    kept = {key: value for key, value in os.environ.items() if not _SECRET_NAMES.search(key.upper())}
    return {
        **kept,
        SUPERVISOR_PID: str(os.getpid()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
