"""Server-sent events from the model server: cut into events, with a deadline between them and pings while it thinks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import orjson

from gateway.upstream import UpstreamTimeout
from parampara.errors import ParamparaError, UpstreamFailed
from parampara.settings import GatewaySettings

DONE = b"[DONE]"
PING_SECONDS = 15.0
PING = b": ping\n\n"
MAX_EVENT_BYTES = 4 * 1024 * 1024


async def events(content: aiohttp.StreamReader, settings: GatewaySettings) -> AsyncIterator[bytes | None]:
    """The ``data`` of each event, ``[DONE]`` last; None after each stretch of silence, when a ping is due.

    Raises:
        UpstreamTimeout: the next event did not come in time, or the answer as a whole takes too long.
        UpstreamFailed: the stream ended without ``[DONE]``.
    """
    buffer = b""
    limit = settings.first_token_seconds
    while True:
        heard = time.monotonic()
        while (piece := await _read(content, min(PING_SECONDS, heard + limit - time.monotonic()), settings.total_seconds)) is None:
            if time.monotonic() - heard >= limit:
                raise UpstreamTimeout(f"The model server sent no token for {limit:g} s.")
            yield None
        if not piece:
            raise UpstreamFailed("The model server broke the stream off before its end.")
        *complete, buffer = (buffer + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(buffer) > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"The model server sent an event of more than {MAX_EVENT_BYTES} bytes.")
        for event in complete:
            for line in event.split(b"\n"):
                if line.startswith(b"data:"):
                    data = line[5:].strip()
                    yield data
                    if data == DONE:
                        return
        limit = settings.inter_token_seconds


async def _read(content: aiohttp.StreamReader, seconds: float, total: float) -> bytes | None:
    """What has arrived, empty at the end of the stream, None when nothing came within ``seconds``.

    Raises:
        UpstreamTimeout: the client session's own limit on the whole exchange is over; every further read would fail at once.
    """
    silence = asyncio.timeout(max(seconds, 0))
    try:
        async with silence:
            return await content.readany()
    except TimeoutError:
        if silence.expired():
            return None
        raise UpstreamTimeout(f"The answer took longer than {total:g} s (PARAMPARA_GATEWAY__TOTAL_SECONDS).") from None


def frame(data: bytes | dict[str, Any]) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else orjson.dumps(data)) + b"\n\n"


def refuse_error(data: dict[str, Any]) -> None:
    """vLLM reports a failure inside a stream as an event; raise it as ours."""
    error = data.get("error")
    if error is None:
        return
    message = error.get("message") if isinstance(error, dict) else error
    raise StreamError(str(message)[:2000])


class StreamError(ParamparaError):
    status = 502
    code = "upstream_error"
