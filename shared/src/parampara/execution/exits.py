"""What the end of a stage process means: from its exit code and the files it left."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from parampara.db.storable import storable
from parampara.errors import EXIT_BAD_INPUT, EXIT_BUSY, EXIT_DISK_FULL, EXIT_DIVERGED, EXIT_OK, EXIT_OUT_OF_MEMORY, EXIT_PREEMPTED
from parampara.schemas.ingest import IngestResult
from parampara.schemas.stages import DeployResult, EvaluateResult, Kind, MergeResult, QuantizeResult, TrainResult

RESULTS: dict[Kind, type[BaseModel]] = {
    "dapt": TrainResult,
    "sft": TrainResult,
    "dpo": TrainResult,
    "merge": MergeResult,
    "quantize": QuantizeResult,
    "evaluate": EvaluateResult,
    "deploy": DeployResult,
    "ingest": IngestResult,
}
_DEFAULT_MESSAGES = {
    EXIT_DIVERGED: ("diverged", "the loss is no longer finite"),
    EXIT_DISK_FULL: ("disk_full", "no room left on the disk; free some and retry the job, which goes on from its last checkpoint"),
    EXIT_OUT_OF_MEMORY: ("out_of_memory", "the stage ran out of memory"),
    EXIT_BAD_INPUT: ("invalid_data", "the stage refused its configuration or data"),
}


@dataclass(frozen=True)
class Ending:
    outcome: Literal["succeeded", "failed", "crashed", "preempted", "cancelled", "busy"]
    exit_code: int
    log_tail: str
    error: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)


def read_ending(workdir: Path, code: int, *, stopped_because: str | None, log_tail: str, kind: Kind) -> Ending:
    """``code`` is the exit code, -N for signal N; ``stopped_because`` is why the supervisor asked the stage to stop, if it did."""
    error = _error(workdir) or _described(code)
    if stopped_because == "cancelled":
        return Ending("cancelled", code, log_tail, error)
    if code == EXIT_OK:
        return _succeeded(workdir, code, log_tail, kind)
    if stopped_because == "stalled":
        return Ending("crashed", code, log_tail, {"code": "stalled", "message": "the stage reported nothing for too long and was stopped"})
    if stopped_because is not None:
        return Ending("preempted", code, log_tail, {"code": "preempted", "message": stopped_because})
    if code == EXIT_BUSY:
        last = log_tail.rstrip().rpartition("\n")[2]
        return Ending("busy", code, log_tail, {"code": "workdir_busy", "message": last or "another process works in the job's directory"})
    if code == EXIT_PREEMPTED:  # counted: a stage that always stops by itself would be started again for ever
        message = f"the stage stopped although nobody had asked it to: {error['message']}"
        return Ending("crashed", code, log_tail, {"code": "preempted_unasked", "message": message})
    return Ending("failed" if code in _DEFAULT_MESSAGES else "crashed", code, log_tail, error)


def _succeeded(workdir: Path, code: int, log_tail: str, kind: Kind) -> Ending:
    try:
        result = RESULTS[kind].model_validate_json((workdir / "result.json").read_bytes())
    except (OSError, ValidationError) as error:
        message = storable(f"the stage left no valid result: {error}")
        return Ending("crashed", code, log_tail, {"code": "bad_result", "message": message})
    return Ending("succeeded", code, log_tail, result=storable(result.model_dump(mode="json")))


def _error(workdir: Path) -> dict[str, Any] | None:
    """The error that the stage wrote; None when it died before it could."""
    try:
        error = json.loads((workdir / "error.json").read_bytes())["error"]
        told = {"code": error.get("code"), "message": str(error["message"]), "param": error.get("param"), "type": error.get("type")}
        return storable(told)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _described(code: int) -> dict[str, Any]:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = " (often: the machine ran out of memory)" if -code == signal.SIGKILL else ""
        return {"code": "killed", "message": f"the stage process was killed by {name}{hint}"}
    name, message = _DEFAULT_MESSAGES.get(code, ("stage_crashed", f"the stage process ended with exit code {code}"))
    return {"code": name, "message": message}
