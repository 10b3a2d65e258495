"""One worker thread for the encoder; requests that wait together are encoded together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy

from embedder.model import SentenceEncoder
from parampara.errors import RateLimited

MAX_WAITING_TOKENS = 500_000
MAX_BATCH_TOKENS = 16_384


@dataclass
class _Waiting:
    token_lists: list[list[int]]
    vectors: asyncio.Future[numpy.ndarray]
    tokens: int


class Batcher:
    """Start it inside the event loop that serves requests; ``close`` ends its task and thread."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self._encoder = encoder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")
        # tokenising a long document must not wait behind the encoder, and never blocks the event loop
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._waiting_tokens = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for pool in (self._thread, self._tokenizing):
            pool.shutdown(wait=False, cancel_futures=True)

    async def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._encoder.tokenize, texts)

    async def encode(self, token_lists: list[list[int]]) -> numpy.ndarray:
        """Unit vectors ``[texts, dimensions]``, float32.

        Raises:
            RateLimited: too much is waiting already.
        """
        tokens = sum(map(len, token_lists))
        if self._waiting_tokens and self._waiting_tokens + tokens > MAX_WAITING_TOKENS:
            raise RateLimited(f"{self._waiting_tokens} tokens wait to be embedded (limit {MAX_WAITING_TOKENS}); try again in a moment.")
        waiting = _Waiting(token_lists, asyncio.get_running_loop().create_future(), tokens)
        self._waiting_tokens += tokens
        self._queue.put_nowait(waiting)
        return await waiting.vectors

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            lists = [ids for waiting in batch for ids in waiting.token_lists]
            try:
                vectors = (await loop.run_in_executor(self._thread, self._encoder.encode, lists)).numpy()
            except (RuntimeError, ValueError) as error:  # torch reports every fault of a forward pass as one of these
                _fail(batch, error)
                continue
            start = 0
            for waiting in batch:
                end = start + len(waiting.token_lists)
                if not waiting.vectors.done():
                    waiting.vectors.set_result(vectors[start:end])
                start = end

    async def _next_batch(self) -> list[_Waiting]:
        """Whatever waits now, up to the batch limit, without those whose caller has gone."""
        batch = [await self._queue.get()]
        tokens = batch[0].tokens
        while not self._queue.empty() and tokens < MAX_BATCH_TOKENS:
            batch.append(self._queue.get_nowait())
            tokens += batch[-1].tokens
        self._waiting_tokens -= tokens
        return [waiting for waiting in batch if not waiting.vectors.done()]


def _fail(batch: list[_Waiting], error: Exception) -> None:
    for waiting in batch:
        if not waiting.vectors.done():
            waiting.vectors.set_exception(error)
