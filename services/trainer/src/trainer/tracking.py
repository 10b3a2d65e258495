"""W&B, MLflow and TensorBoard, through transformers' own callbacks: told where to write, and kept off the network.

The run's own record needs none of them: ``metrics.jsonl``, ``progress.jsonl`` and the checkpoints in its directory.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from parampara.errors import InvalidRequest
from parampara.schemas.stages import Tracker, Tracking

_MODULES: dict[Tracker, tuple[str, ...]] = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""What each needs, by its name in the registry too; one of them is enough."""


def prepare(tracking: Tracking, *, directory: Path, run: str) -> None:
    """Set up the libraries of ``tracking.report_to``.

    They read environment variables. One that is set already wins, so that ``MLFLOW_TRACKING_URI`` or ``WANDB_MODE=online`` of whoever
    starts the worker leads elsewhere than into ``directory``. ``run`` names the run; a resumed one goes on under its name.

    Raises:
        InvalidRequest: a library is not installed.
    """
    for name in tracking.report_to:
        if not any(importlib.util.find_spec(module) for module in _MODULES[name]):
            raise InvalidRequest(
                f"tracking.report_to names {name}, which is not installed here; take it out, or: pip install {_MODULES[name][0]}.",
                param="tracking.report_to",
            )
        (directory / name).mkdir(parents=True, exist_ok=True)
        for variable, value in _variables(name, tracking, directory / name, run).items():
            os.environ.setdefault(variable, value)


def silence(trainer: Any) -> None:
    """Take the trackers away from a rank whose curve another one writes."""
    from transformers.integrations import get_reporting_integration_callbacks

    for callback in get_reporting_integration_callbacks(trainer.args.report_to):
        trainer.remove_callback(callback)


def _variables(name: Tracker, tracking: Tracking, directory: Path, run: str) -> dict[str, str]:
    if name == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(directory / run)}
    if name == "wandb":  # offline: a stage has no credentials; `wandb sync` uploads from the directory
        ours = {"WANDB_MODE": "offline", "WANDB_DIR": str(directory), "WANDB_CONSOLE": "off", "WANDB_DISABLE_CODE": "true"}
        return {**ours, "WANDB_PROJECT": tracking.project, "WANDB_RUN_ID": run, "WANDB_RESUME": "allow"}
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{directory}/mlflow.db", "MLFLOW_EXPERIMENT_NAME": tracking.project}
