"""llm-compressor's own environment, for tests that run it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("LLMCOMPRESSOR_PYTHON") or Path(__file__).parents[2] / ".venv-llmcompressor" / "bin" / "python")
needs_llmcompressor = pytest.mark.skipif(
    not PYTHON.is_file(), reason="no llm-compressor here: python3 scripts/setup.py --only llmcompressor"
)
