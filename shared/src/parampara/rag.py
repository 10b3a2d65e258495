"""How retrieved passages are laid before a model: one text form, shared by the gateway and by open-book training rows.

What a model was trained on is what it is served with, so the form lives here and nowhere else. The literal marker stands
before each passage because small models cite what they can copy.
"""

from __future__ import annotations

from collections.abc import Sequence

INSTRUCTION = "Answer from the passages below and cite them as [n]. If they do not hold the answer, say so."


def context_message(passages: Sequence[str], *, system_prompt: str | None = None) -> str:
    """The system message for ``passages``; passage ``i`` carries the marker ``[i + 1]``."""
    blocks = [f"[{number}] {' '.join(passage.split())}" for number, passage in enumerate(passages, 1)]
    return "\n".join([*([system_prompt] if system_prompt else []), INSTRUCTION, *blocks])
