"""Runs in lm-evaluation-harness's own environment, which has none of this project's packages: ``python -I harness_child.py REQUEST``.

REQUEST is a JSON file: names of ``tasks``, the ``tasks_directory`` to look for them first (or null), ``output`` for what is found, and
``model`` (null: only load the tasks) with ``dtype``, ``limit``, ``num_fewshot``, ``batch_size``, ``apply_chat_template`` and ``seed``.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import signal
import sys
from pathlib import Path
from typing import Any

_KEPT = (
    "results",
    "groups",
    "group_subtasks",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "lm_eval_version",
    "transformers_version",
)
"""Of the library's result: no paths, no names of the machine."""


def main(request: dict[str, Any]) -> None:
    manager = find_tasks(request["tasks"], request["tasks_directory"])
    if request["model"] is None:
        manager.load(request["tasks"])  # with their data sets
        found: dict[str, Any] = {}
    else:
        found = evaluate(request, manager)
    Path(request["output"]).write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


def find_tasks(names: list[str], directory: str | None) -> Any:
    """The library's task manager that knows all of ``names``; its own thousands of tasks are read only where the directory lacks one."""
    library = importlib.import_module("lm_eval.tasks")
    for own in (False, True):
        manager = library.TaskManager(include_path=directory, include_defaults=own)
        if not (missing := sorted(set(names) - set(manager.all_tasks))):
            return manager
    where = f"neither in {directory} nor" if directory else "not"
    raise SystemExit(f"{', '.join(missing)}: {where} among the tasks of lm-evaluation-harness")


def evaluate(request: dict[str, Any], manager: Any) -> dict[str, Any]:
    torch, library = importlib.import_module("torch"), importlib.import_module("lm_eval")
    model = {"pretrained": request["model"], "dtype": request["dtype"], "trust_remote_code": False}
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), request["seed"])
    found = library.simple_evaluate(
        model="hf",
        model_args=model,
        tasks=request["tasks"],
        num_fewshot=request["num_fewshot"],
        limit=request["limit"],
        batch_size=request["batch_size"],
        apply_chat_template=request["apply_chat_template"],
        device="cuda:0" if torch.cuda.is_available() else "cpu",
        task_manager=manager,
        log_samples=False,
        **seeds,
    )
    return {key: found[key] for key in _KEPT if key in found}


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlives the stage
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
