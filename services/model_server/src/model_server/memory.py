"""What the supervisor says about its deployment, and what it remembers over a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_server.command import Wanted

Status = Literal["starting", "ready", "failed", "stopped"]
log = structlog.get_logger("model_server")


class Report(BaseModel):
    """What became of the newest ``PUT /deployment``, and what is served meanwhile."""

    model_config = ConfigDict(protected_namespaces=())

    status: Status
    model_name: str | None = None
    alias: str | None = None
    generation: int = 0
    artifact_id: str | None = None
    vllm_url: str | None = None
    serving: str | None = None
    """The model that answers right now; after a failed deployment, the one before it."""
    first_answer: str | None = None
    ready_seconds: float | None = None
    restarts: int = 0
    error: str | None = None
    log_tail: str | None = None


class Verdict(BaseModel):
    """What the deployer says about a deployment on trial: the body of ``POST /deployment/verdict``."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model_name: str
    alias: str
    generation: int
    accepted: bool
    reason: str = Field(default="", max_length=10_000)
    """Why not; becomes the failed deployment's error."""

    def is_on(self, wanted: Wanted) -> bool:
        return (self.model_name, self.alias, self.generation) == (wanted.model_name, wanted.alias, wanted.generation)


class Memory(BaseModel):
    """What survives a restart of the supervisor."""

    wanted: Wanted | None = None
    proven: Wanted | None = None
    """The last deployment that answered and, if it was on trial, was accepted: what a failed one is rolled back to."""
    generations: dict[str, int] = {}
    """Per alias, the newest generation that was accepted."""
    failed: Report | None = None
    """The newest deployment, when it could not start and was rolled back."""


def remember(path: Path) -> Memory:
    """The memory in ``path``; an empty one when there is none, or none that can be read."""
    try:
        return Memory.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Memory()
    except ValidationError as error:
        log.error("the remembered deployment is unreadable; starting empty", path=str(path), error=str(error))
        return Memory()
