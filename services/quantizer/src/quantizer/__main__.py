"""``python -m quantizer quantize --config FILE --workdir DIR`` runs the stage; ``python -m quantizer worker`` serves its queue."""

from __future__ import annotations

from parampara.execution.child import Stage, main
from parampara.schemas.stages import QuantizeConfig


def _quantize():
    from quantizer.quantize import run  # here, so that --help and the worker stay light

    return run


if __name__ == "__main__":
    main("quantizer", stages={"quantize": Stage(QuantizeConfig, _quantize)}, queue="quantize")
