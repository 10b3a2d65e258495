"""What Postgres takes as text and JSON: no NUL, no half of a surrogate pair, no NaN and no infinity."""

from __future__ import annotations

import math
import re
from typing import Any

_NOT_TEXT = re.compile("[\x00\ud800-\udfff]")


def storable(value: Any) -> Any:
    """Plain data from outside in a form that can be written: what can not be stored is dropped from texts and keys, and a
    number that is not finite becomes None. Everything else stays what it is.
    """
    if isinstance(value, str):
        return _NOT_TEXT.sub("", value)
    if isinstance(value, dict):
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
