"""Makes the example's scripts importable by their own names, as they are when one of them is run."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "kp"
if str(EXAMPLE) not in sys.path:
    sys.path.insert(0, str(EXAMPLE))
