"""``python -m evaluator evaluate --config FILE --workdir DIR`` runs the stage; ``python -m evaluator worker`` serves its queue."""

from __future__ import annotations

from parampara.execution.child import Stage, main
from parampara.schemas.stages import EvaluateConfig


def _evaluate():
    from evaluator.evaluate import run  # here, so that --help and the worker stay light

    return run


if __name__ == "__main__":
    main("evaluator", stages={"evaluate": Stage(EvaluateConfig, _evaluate)}, queue="evaluate")
