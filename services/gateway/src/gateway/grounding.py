"""Lay passages before the model, as many as its window holds, and keep room for the answer."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway import metrics
from gateway.search import Passage
from parampara.errors import InvalidRequest
from parampara.rag import context_message

Count = Callable[[list[dict[str, Any]]], Awaitable[int]]
Messages = list[dict[str, Any]]
_MIN_PASSAGE = 120
"""Characters under which a passage that had to be cut says too little to be worth laying down."""
_MARKER = re.compile(r"\[(\d{1,4}(?:\s*,\s*\d{1,4})*)\]")


@dataclass(frozen=True)
class Grounded:
    """A prompt with its passages. ``passages[i]`` carries the marker ``[i + 1]``."""

    messages: Messages
    passages: list[Passage] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    """Each passage as the model sees it."""
    dropped: int = 0
    max_tokens: int | None = None
    query: str = ""


def lay(messages: Messages, passages: Sequence[str]) -> Messages:
    """``messages`` with the passages in the system message, in the form that the model was trained on."""
    if not passages:
        return messages
    first = messages[0] if messages[0]["role"] == "system" else None
    system = context_message(passages, system_prompt=first["content"] if first else None)
    return [{"role": "system", "content": system}, *(messages[1:] if first else messages)]


async def ground(
    messages: Messages,
    passages: Sequence[Passage],
    *,
    query: str,
    max_tokens: int | None,
    answer_tokens: int,
    window: int | None,
    count: Count,
) -> Grounded:
    """Fit passages into ``window`` tokens: the lowest-ranked are left out first, a single one that is too long is cut.

    ``max_tokens`` is the client's upper bound on the answer. It comes back lowered to what is left of the window, and up to
    half of the window is kept free for it.

    Raises:
        InvalidRequest: ``context_length_exceeded``, the conversation alone leaves no room for an answer.
    """
    # a passage that holds "[2]" or "[2, 3]" itself would be mistaken for passage 2
    texts = [_MARKER.sub(r"(\1)", passage.text) for passage in passages]
    if window is None:
        return _grounded(messages, passages, texts, query, max_tokens)
    room = window - min(max_tokens, window // 2) if max_tokens else window - min(answer_tokens, window // 4)

    async def tokens(number: int) -> int:
        return await count(lay(messages, texts[:number]))

    fits, used = len(texts), await tokens(len(texts))
    if used > room:
        fits, used = await _largest_fit(tokens, len(texts), room)
    if fits < 0:  # the conversation alone takes more than its share; it may still go through without passages
        fits, used = 0, await tokens(0)
        if used >= window:
            raise InvalidRequest(
                f"The messages have {used} tokens, but this model's window is {window}. Send fewer or shorter messages.",
                param="messages",
                code="context_length_exceeded",
            )
    if fits == 0 and texts and (cut := await _cut_first(messages, texts[0], room, count)) is not None:
        texts, used, fits = [cut[0]], cut[1], 1
    left = window - used
    return _grounded(messages, passages[:fits], texts[:fits], query, min(max_tokens or left, left), dropped=len(passages) - fits)


def _grounded(
    messages: Messages, passages: Sequence[Passage], shown: list[str], query: str, max_tokens: int | None, *, dropped: int = 0
) -> Grounded:
    metrics.PASSAGES.observe(len(passages))
    return Grounded(lay(messages, shown), list(passages), shown, dropped, max_tokens, query)


async def _largest_fit(tokens: Callable[[int], Awaitable[int]], too_many: int, room: int) -> tuple[int, int]:
    """The largest number of passages below ``too_many`` that fits, and its tokens; -1 when not even none fits."""
    low, high, used = -1, too_many, 0
    while high - low > 1:
        middle = (low + high) // 2
        now = await tokens(middle)
        if now <= room:
            low, used = middle, now
        else:
            high = middle
    return low, used


async def _cut_first(messages: Messages, text: str, room: int, count: Count) -> tuple[str, int] | None:
    """The beginning of the best passage, halved until it fits; None when hardly anything would be left of it."""
    while len(text) // 2 >= _MIN_PASSAGE:
        text = text[: len(text) // 2].rsplit(None, 1)[0]
        used = await count(lay(messages, [text]))
        if used <= room:
            return text, used
    return None
