"""``stack.json`` and the lock beside it: how one `parampara` command finds the stack that another one runs."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from pydantic import BaseModel, ValidationError

from parampara.errors import Unavailable, WrongState
from parampara.storage import write_atomically
from standalone.places import Places


class ProcessRecord(BaseModel):
    """One process of the stack; pid and creation time together name it for good."""

    name: str
    pid: int | None
    created_at: float
    state: str
    restarts: int = 0
    where: str = ""
    log: str = ""


class StackState(BaseModel):
    """What the stack says of itself."""

    pid: int
    status: str
    """``starting ready stopping``."""
    gateway_url: str
    ports: dict[str, int]
    processes: list[ProcessRecord] = []

    @property
    def base_url(self) -> str:
        """Base URL for OpenAI clients."""
        return f"{self.gateway_url}/v1"


@contextmanager
def only_stack(places: Places) -> Iterator[None]:
    """Hold the home folder for one stack.

    Raises:
        WrongState: another stack runs on it; says which.
    """
    places.home.mkdir(parents=True, exist_ok=True)
    with places.lock.open("a+") as file:
        os.set_inheritable(file.fileno(), False)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            state = load(places)
            known = f" (pid {state.pid}, {state.gateway_url})" if state else ""
            raise WrongState(
                f"A stack already runs on {places.home}{known}. `parampara down` stops it; "
                "set PARAMPARA_HOME to another folder for a second one.",
                code="already_running",
            ) from None
        yield


def is_running(places: Places) -> bool:
    """Whether a living `parampara up` holds the lock."""
    try:
        with places.lock.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def save(places: Places, state: StackState) -> None:
    write_atomically(places.state, json.dumps(state.model_dump(), indent=1).encode())


def load(places: Places) -> StackState | None:
    """The last state written, by a stack that may be gone by now."""
    try:
        return StackState.model_validate_json(places.state.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def running(places: Places) -> StackState:
    """The state of the stack that runs now.

    Raises:
        Unavailable: none does.
    """
    state = load(places) if is_running(places) else None
    # a stack that is just starting may not have replaced the file of one that was killed
    if state is None or not psutil.pid_exists(state.pid):
        raise Unavailable(f"No stack runs on {places.home}; start one with `parampara up` (or `make up`).", code="not_running")
    return state


def leftovers(state: StackState | None) -> list[tuple[int, float]]:
    """Processes that a killed stack may have left behind, as ``(pid, creation time)``."""
    return [(record.pid, record.created_at) for record in (state.processes if state else []) if record.pid]


def records(children: list[Any], created_at: Any) -> list[ProcessRecord]:
    """How the children of a stack look right now."""
    return [
        ProcessRecord(
            name=child.spec.name,
            pid=child.pid,
            created_at=created_at(child.pid) if child.pid else 0.0,
            state=child.state,
            restarts=child.restarts,
            where=child.spec.where,
            log=str(child.log),
        )
        for child in children
    ]
