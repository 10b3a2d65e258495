"""State of every random number generator that training draws from, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch


def capture() -> dict[str, Any]:
    """States of Python's, NumPy's, torch's CPU and (where there is one) CUDA's generators."""
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {"name": name, "keys": torch.from_numpy(numpy.asarray(keys).astype(numpy.int64)), "rest": (position, has_gauss, gauss)},
        "torch": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    keys = state["numpy"]["keys"].numpy().astype(numpy.uint32)
    numpy.random.set_state((state["numpy"]["name"], keys, *state["numpy"]["rest"]))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
