"""HTTP towards the model server and the embedder: one pooled client, bounded waits, and every failure as one of our errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson
import structlog

from parampara.errors import InvalidRequest, ParamparaError, RateLimited, Unavailable, UpstreamFailed
from parampara.settings import GatewaySettings

log = structlog.get_logger("gateway.upstream")
_MAX_ERROR_BYTES = 65_536
_INFO_SECONDS = 10.0
_INFO_TIMEOUT = aiohttp.ClientTimeout(total=5, sock_connect=2)


class UpstreamTimeout(UpstreamFailed):
    """The model server was given a request and did not answer in time."""

    status = 504
    code = "upstream_timeout"
    headers = {"X-Should-Retry": "false"}
    """Sending the same work again to a server that can not keep up only makes it slower."""


@dataclass(frozen=True)
class ServedModels:
    """What a model server says about itself."""

    windows: Mapping[str, int | None]
    """Model id to its ``max_model_len``."""
    taken: float


def make_client(settings: GatewaySettings) -> aiohttp.ClientSession:
    """The one client session of the process; proxies and cookies of the environment are ignored."""
    # uvicorn closes idle connections after 5 s: keep ours for less, so a request never meets a closing one
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2, ttl_dns_cache=30)
    timeout = aiohttp.ClientTimeout(total=settings.total_seconds, sock_connect=settings.connect_seconds)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"accept-encoding": "identity"},
        read_bufsize=2**18,
    )


@asynccontextmanager
async def calling(what: str, retry_code: str) -> AsyncIterator[None]:
    """Turn the client library's exceptions into ours; ``what`` is named in the message.

    Raises:
        Unavailable: nothing listens there.
        UpstreamTimeout: no answer in time.
        UpstreamFailed: the connection broke.
    """
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        log.warning("upstream unreachable", upstream=what, cause=str(error))
        raise Unavailable(f"The {what} is not reachable just now; it may be starting. Try again in a moment.", code=retry_code) from error
    except TimeoutError as error:
        raise UpstreamTimeout(f"The {what} did not answer in time.") from error
    except (aiohttp.ClientError, OSError) as error:
        log.warning("upstream failed", upstream=what, cause=repr(error))
        raise UpstreamFailed(f"The connection to the {what} broke off: {type(error).__name__}.") from error


class ModelServers:
    """Calls to the model servers that aliases point at."""

    def __init__(self, client: aiohttp.ClientSession, settings: GatewaySettings) -> None:
        self._client, self._settings = client, settings
        self._served: dict[str, ServedModels] = {}

    @asynccontextmanager
    async def post(self, url: str, body: Mapping[str, Any], *, request_id: str, stream: bool) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with status 200; leaving the block early closes the connection, which cancels the generation.

        Raises:
            ParamparaError: whatever the server answered instead, in our words; see :func:`calling` too.
        """
        seconds = self._settings.first_token_seconds if stream else self._settings.total_seconds
        headers = {"content-type": "application/json", "x-request-id": request_id}
        async with calling("model server", "model_unavailable"):
            async with asyncio.timeout(seconds):
                response = await self._client.post(url, data=orjson.dumps(body), headers=headers)
            complete = False
            try:
                if response.status != 200:
                    raise await error_of(response, "model server")
                yield response
                complete = response.content.at_eof()
            finally:
                if complete:
                    response.release()
                else:
                    response.close()

    async def window(self, url: str, model: str) -> int | None:
        """``max_model_len`` of a served model, remembered for some seconds; None when the server does not tell.

        Raises:
            Unavailable: the server is away, or serves another model just now.
        """
        served = self._served.get(url)
        if served is None or time.monotonic() - served.taken > _INFO_SECONDS or model not in served.windows:
            served = await self._ask(url)
        if model not in served.windows:
            raise _switching(model)
        return served.windows[model]

    async def _ask(self, url: str) -> ServedModels:
        async with calling("model server", "model_unavailable"), self._client.get(f"{url}/v1/models", timeout=_INFO_TIMEOUT) as response:
            if response.status != 200:
                raise await error_of(response, "model server")
            data = orjson.loads(await response.read())
        served = ServedModels({entry["id"]: entry.get("max_model_len") for entry in data["data"]}, time.monotonic())
        self._served[url] = served
        return served

    async def count_tokens(self, url: str, model: str, messages: list[dict[str, Any]]) -> int:
        """Tokens of a chat prompt as the server's own template renders it; an over-estimate where it has no ``/tokenize``."""
        body = {"model": model, "messages": messages, "add_generation_prompt": True}
        async with (
            calling("model server", "model_unavailable"),
            self._client.post(f"{url}/tokenize", data=orjson.dumps(body), headers={"content-type": "application/json"}) as response,
        ):
            if response.status == 200:
                return int(orjson.loads(await response.read())["count"])
            if response.status not in (404, 405, 501):
                raise await error_of(response, "model server")
        return sum(16 + len(str(message.get("content") or "").encode()) // 2 for message in messages)


async def error_of(response: aiohttp.ClientResponse, what: str) -> ParamparaError:
    """What a refusal means to our client: its own mistake stays its own, anything else is the upstream's."""
    message, param, code = _error_fields(await response.content.read(_MAX_ERROR_BYTES))
    status = response.status
    if status == 404 and "model" in message.lower():
        return _switching(None)
    if status in (400, 413, 422):
        if "context length" in message or "max_model_len" in message:
            code = "context_length_exceeded"
        return InvalidRequest(message or f"The {what} refused the request.", param=param, code=code or "invalid_value")
    if status == 429:
        return RateLimited(f"The {what} is full; try again in a moment.")
    if status == 503:
        return Unavailable(f"The {what} is not ready; try again in a moment.", code="model_unavailable")
    log.warning("upstream answered with an error", upstream=what, status=status, message=message[:500])
    return UpstreamFailed(f"The {what} failed (status {status}).")


def _error_fields(body: bytes) -> tuple[str, str | None, str | None]:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "", None, None
    error = data.get("error", data) if isinstance(data, dict) else {}
    if not isinstance(error, dict):
        return str(error), None, None
    code = error.get("code")
    param = error.get("param")
    # vLLM puts the HTTP status where OpenAI has a word
    return str(error.get("message") or ""), param if isinstance(param, str) else None, code if isinstance(code, str) else None


def _switching(model: str | None) -> Unavailable:
    name = f" {model!r}" if model else ""
    return Unavailable(
        f"The model{name} is not loaded just now: the model server is starting or switching. Try again in a moment.", code="model_starting"
    )
