"""How much work the gateway lets in at one time; what is over that is refused at once, with a word on when to come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway import metrics
from parampara.errors import RateLimited
from parampara.settings import GatewaySettings


class Admission:
    def __init__(self, settings: GatewaySettings) -> None:
        self._total, self._per_key = settings.max_inflight, settings.max_inflight_per_key
        self._by_key: Counter[str] = Counter()
        self._now = 0

    @contextmanager
    def admit(self, key_id: str) -> Iterator[None]:
        """Hold one place for the length of the block.

        Raises:
            RateLimited: no place is free; becomes a 429 with ``Retry-After``.
        """
        if self._now >= self._total:
            raise RateLimited(f"The server is busy with {self._now} requests (limit {self._total}); try again in a moment.")
        if self._by_key[key_id] >= self._per_key:
            raise RateLimited(f"This key has {self._by_key[key_id]} requests running (limit {self._per_key}); wait for one to end.")
        self._now += 1
        self._by_key[key_id] += 1
        metrics.INFLIGHT.set(self._now)
        try:
            yield
        finally:
            self._now -= 1
            self._by_key[key_id] -= 1
            if not self._by_key[key_id]:
                del self._by_key[key_id]
            metrics.INFLIGHT.set(self._now)
