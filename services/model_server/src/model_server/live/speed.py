"""How fast the served model writes: a few seconds of one stream, and of four at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from model_server.live.endpoint import Endpoint, Refused, token_ids

STREAMS = 4
MAX_TOKENS = 128
SECONDS = 3.0
"""From its first token until a stream is left, so that a slow machine is measured too."""


@dataclass(frozen=True)
class Pace:
    """Tokens of one stream by the second in which they came."""

    asked: float
    arrivals: Sequence[tuple[float, int]]

    @property
    def first(self) -> float:
        return self.arrivals[0][0]

    @property
    def last(self) -> float:
        return self.arrivals[-1][0]

    @property
    def later_tokens(self) -> int:
        """Tokens that came after the first event, which took the time of the prompt."""
        return sum(count for _, count in self.arrivals[1:])


def measure(endpoint: Endpoint, messages: Sequence[dict[str, Any]], *, room: int) -> dict[str, float]:
    """``tokens_per_second`` of one stream after its first token, ``tokens_per_second_4_streams`` of four together, and
    ``first_token_seconds``; ``room``: tokens that still fit behind the prompt.

    Raises:
        Refused: vLLM refused, or wrote fewer than two tokens.
        Unavailable, Preempted: see :class:`Endpoint`.
    """
    tokens = max(min(MAX_TOKENS, room), 2)
    single = _write(endpoint, messages, tokens)
    with ThreadPoolExecutor(STREAMS) as pool:
        paces = list(pool.map(lambda _: _write(endpoint, messages, tokens), range(STREAMS)))
    return {
        "tokens_per_second": rate([single]),
        f"tokens_per_second_{STREAMS}_streams": rate(paces),
        "first_token_seconds": single.first - single.asked,
    }


def rate(paces: Sequence[Pace]) -> float:
    """Tokens per second of all streams together, from the first token of any to the last of all."""
    seconds = max(pace.last for pace in paces) - min(pace.first for pace in paces)
    return sum(pace.later_tokens for pace in paces) / max(seconds, 1e-6)


def _write(endpoint: Endpoint, messages: Sequence[dict[str, Any]], tokens: int) -> Pace:
    body = {"messages": list(messages), "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    asked = time.monotonic()
    arrivals: list[tuple[float, int]] = []
    with closing(endpoint.stream("/v1/chat/completions", body)) as events:
        for at, event in events:
            if count := len(token_ids(event)):
                arrivals.append((at, count))
            if arrivals and at - arrivals[0][0] > SECONDS:
                break
    if len(arrivals) < 2:
        raise Refused(f"A stream of {tokens} tokens brought {len(arrivals)} events with tokens: no pace can be measured.")
    return Pace(asked=asked, arrivals=arrivals)
