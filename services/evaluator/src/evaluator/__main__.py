"""``python -m evaluator evaluate --config FILE --workdir DIR`` runs the stage; ``python -m evaluator worker`` serves its queue."""

from __future__ import annotations

import os
from functools import partial

from parampara.execution.child import Stage, main
from parampara.judges import KEY_VARIABLE
from parampara.schemas.stages import EvaluateConfig


def _evaluate():
    from evaluator.evaluate import run  # here, so that --help and the worker stay light

    return partial(run, judge_api_key=os.environ.pop(KEY_VARIABLE, ""))  # nothing that the stage starts inherits it


if __name__ == "__main__":
    main("evaluator", stages={"evaluate": Stage(EvaluateConfig, _evaluate)}, queue="evaluate")
