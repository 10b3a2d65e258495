"""Tasks of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness), run by that library on the model to be served.

It lives in an environment of its own, ``.venv-lmeval`` beside the platform's (``LMEVAL_PYTHON`` names another Python), because its pins
are not the platform's. ``harness_child.py`` is what runs there; it reaches no network.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from evaluator.meter import Meter
from evaluator.models import common_dtype
from parampara.errors import InvalidRequest, ParamparaError
from parampara.execution import library_process
from parampara.schemas.metrics import harness_task
from parampara.schemas.stages import EvaluateConfig, HarnessParams

FILE_NAME = "harness.json"
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class HarnessFailed(ParamparaError):
    """lm-evaluation-harness ended without a result; the message has the end of its log."""

    code = "harness_failed"


def find_python() -> Path:
    """The Python of lm-evaluation-harness's environment.

    Raises:
        InvalidRequest: there is none, code ``harness_not_installed``; with the command that makes it.
    """
    python = Path(os.environ.get("LMEVAL_PYTHON") or Path(sys.prefix).parent / ".venv-lmeval" / "bin" / "python")
    if not python.is_file():
        raise InvalidRequest(
            f"lm-evaluation-harness's environment is not here ({python}); make it: python3 scripts/setup.py --only lmeval",
            param="params.harness",
            code="harness_not_installed",
        )
    return python


def work(config: EvaluateConfig) -> int:
    """Items that the tasks take, as :class:`evaluator.meter.Meter` counts them."""
    return len(config.params.harness.tasks) if config.params.harness is not None else 0


def evaluate(config: EvaluateConfig, *, scratch: Path, meter: Meter) -> dict[str, Any]:
    """What the library found on the quantized model, or the merged one where there is none; empty where no task is asked for.

    First it loads every task with its data, so that one that is not here is told before a model is loaded.

    Raises:
        InvalidRequest: no environment (code ``harness_not_installed``), or a task or its data cannot be loaded (``harness_failed``).
        HarnessFailed: it ended without a result.
        Preempted: asked to stop.
    """
    if (params := config.params.harness) is None:
        return {}
    meter.phase("load the tasks of lm-evaluation-harness")
    try:
        _run(config, params, model=None, scratch=scratch, meter=meter)
    except HarnessFailed as error:
        raise InvalidRequest(
            f"A task of params.harness cannot be loaded: {error.message}", param="params.harness", code=error.code
        ) from None
    meter.phase(f"lm-evaluation-harness: {', '.join(params.tasks)}")
    found = _run(config, params, model=config.quantized or config.merged, scratch=scratch, meter=meter)
    meter.advance(len(params.tasks))
    return found


def metrics(found: Mapping[str, Any], params: HarnessParams | None) -> dict[str, float]:
    """``harness.<task>.<figure>`` of the tasks that were asked for, by :func:`parampara.schemas.metrics.harness_task`.

    The library's ``acc,none`` is the figure ``acc``, its ``exact_match,strict-match`` is ``exact_match_strict_match``.
    """
    values: dict[str, float] = {}
    results = {**found.get("results", {}), **found.get("groups", {})}
    for task in params.tasks if params is not None else []:
        for key, value in results.get(task, {}).items():
            figure, comma, filtered = key.partition(",")
            if comma and isinstance(value, int | float) and not isinstance(value, bool):
                measured, error = (figure.removesuffix("_stderr"), "_stderr") if figure.endswith("_stderr") else (figure, "")
                name = harness_task((measured if filtered == "none" else f"{measured}_{filtered}") + error)
                values[f"harness.{harness_task(task)}.{name}"] = float(value)
    return values


def _run(config: EvaluateConfig, params: HarnessParams, *, model: Path | None, scratch: Path, meter: Meter) -> dict[str, Any]:
    python = find_python()
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        request = {
            **params.model_dump(),
            "tasks_directory": str(config.harness_tasks) if config.harness_tasks is not None else None,
            "model": str(model) if model is not None else None,
            "dtype": _dtype(config),
            "seed": config.seed,
            "output": str(scratch / FILE_NAME),
        }
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        command = [str(python), "-I", str(Path(__file__).with_name("harness_child.py")), str(scratch / "request.json")]
        log = scratch / "lmeval.log"
        # where the tasks lie, so that their data may be named beside them
        code = library_process.run(
            command,
            cwd=config.harness_tasks or scratch,
            environment={"HF_DATASETS_CACHE": str(scratch / "datasets")} | library_process.environment() | _OFFLINE,
            log=log,
            check=meter.check,
            alive=partial(meter.advance, 0),
        )
        if code:
            raise HarnessFailed(
                f"lm-evaluation-harness ended with status {code}: {library_process.last_lines(log)}", param="params.harness"
            )
        return json.loads((scratch / FILE_NAME).read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _dtype(config: EvaluateConfig) -> str:
    """As for every other measurement: a quantized model as it is stored, a merged one as on this machine all of the line run."""
    import torch

    return (
        "auto" if config.quantized is not None else str(common_dtype(config.merged, gpu=torch.cuda.is_available())).removeprefix("torch.")
    )
