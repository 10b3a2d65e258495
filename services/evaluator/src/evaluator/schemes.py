"""What the quantizer recorded beside the weights: the schemes that it tried."""

from __future__ import annotations

import json
from pathlib import Path

from parampara.errors import InvalidData
from parampara.schemas.stages import SchemeAttempt


def read_schemes(quantized: Path | None) -> list[SchemeAttempt]:
    """The attempts in ``quantize.json`` of a quantized model, in their order; none where there is no such file.

    Raises:
        InvalidData: the file is not what the quantizer writes.
    """
    path = quantized / "quantize.json" if quantized is not None else None
    if path is None or not path.is_file():
        return []
    try:
        attempts = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        return [SchemeAttempt.model_validate(attempt) for attempt in attempts]
    except (ValueError, LookupError, TypeError) as error:
        raise InvalidData(f"{path} is not the quantizer's record: {error}", param="quantized") from None
