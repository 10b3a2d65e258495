"""Everything that the control plane answers, passed through byte by byte: uploads, downloads and event streams alike."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import structlog
from yarl import URL

from gateway.directory import Directory
from gateway.exchange import ClientGone, Exchange, too_large
from gateway.upstream import calling
from parampara.errors import NotFound, ParamparaError, Unavailable
from parampara.settings import Settings

PREFIXES = tuple(
    f"/v1/{name}"
    for name in ("files", "uploads", "fine_tuning", "runs", "jobs", "artifacts", "deployments", "aliases", "estimates", "api_keys")
)
_UPLOADS = ("/v1/files", "/v1/uploads")
_FORM_OVERHEAD_BYTES = 1_048_576
_CHANGES_DIRECTORY = ("/v1/aliases", "/v1/api_keys", "/v1/deployments")
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"}
_NOT_FORWARDED = _HOP_BY_HOP | {"host", "x-request-id", "expect"}
_NOT_RETURNED = _HOP_BY_HOP | {"date", "server", "x-request-id"}
# silence is normal in an event stream; the control plane sends a ping well before this
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=2, sock_read=600)


log = structlog.get_logger("gateway.passthrough")


def belongs_to_control_plane(path: str) -> bool:
    return any(path == prefix or path.startswith(prefix + "/") for prefix in PREFIXES)


class Passthrough:
    def __init__(self, client: aiohttp.ClientSession, directory: Directory, settings: Settings) -> None:
        self._client, self._directory, self._settings = client, directory, settings

    async def forward(self, exchange: Exchange) -> None:
        """Send the request on and its answer back; a client that leaves ends the control plane's side too."""
        if any(part in (".", "..") for part in exchange.path.split("/")):
            raise NotFound(f"No such URL: {exchange.method} {exchange.path[:200]}.", code="unknown_url")
        body = _Body(exchange, limit=self._limit(exchange.path))
        work = asyncio.ensure_future(self._send(exchange, body))
        read = asyncio.ensure_future(body.read.wait())
        try:
            await asyncio.wait((work, read), return_when=asyncio.FIRST_COMPLETED)
            await (work if work.done() else exchange.race(work))
        except ParamparaError:
            if body.fault is not None:
                raise body.fault from None  # the client library wraps what stopped the upload
            raise
        finally:
            work.cancel()
            read.cancel()
            await asyncio.gather(work, read, return_exceptions=True)

    async def _send(self, exchange: Exchange, body: _Body) -> None:
        raw = (exchange.scope.get("raw_path") or exchange.path.encode()).decode("latin-1")
        query = exchange.scope["query_string"].decode("latin-1")
        url = URL(self._settings.gateway.control_plane_url.rstrip("/") + raw + (f"?{query}" if query else ""), encoded=True)
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in exchange.scope["headers"]]
        kept = [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]
        kept.append(("x-request-id", exchange.request_id))
        data = body.pieces() if body.expected else None
        if data is None:
            body.read.set()
        async with (
            calling("control plane", "control_plane_unavailable"),
            self._client.request(exchange.method, url, headers=kept, data=data, timeout=_TIMEOUT, allow_redirects=False) as response,
        ):
            if exchange.method != "GET" and exchange.path.startswith(_CHANGES_DIRECTORY):
                await self._refresh_directory()
            await _return(exchange, response)

    async def _refresh_directory(self) -> None:
        """Who has changed an alias or a key finds it changed in the next request.

        The answer comes first: it may hold a new key, which is shown this once.
        """
        try:
            await self._directory.refresh()
        except Unavailable as error:
            log.warning("keys and aliases not refreshed after a change", cause=repr(error.__cause__))

    def _limit(self, path: str) -> int:
        uploads = path.startswith(_UPLOADS)
        return self._settings.max_upload_bytes + _FORM_OVERHEAD_BYTES if uploads else self._settings.gateway.max_body_bytes


class _Body:
    """The request body on its way through. ``read`` is set once all of it was received, so nothing else may read before."""

    def __init__(self, exchange: Exchange, *, limit: int) -> None:
        self._exchange, self._limit = exchange, limit
        self.read = asyncio.Event()
        self.fault: Exception | None = None
        declared = exchange.headers.get(b"content-length", b"")
        self.expected = b"transfer-encoding" in exchange.headers or declared not in (b"", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            raise too_large(limit)

    async def pieces(self) -> AsyncIterator[bytes]:
        size, more = 0, True
        while more:
            message = await self._exchange.receive()
            if message["type"] == "http.disconnect":
                raise self._failed(ClientGone())
            piece, more = message.get("body", b""), message.get("more_body", False)
            size += len(piece)
            if size > self._limit:
                raise self._failed(too_large(self._limit))
            if piece:
                yield piece
        self.read.set()

    def _failed(self, fault: Exception) -> Exception:
        self.fault = fault
        return fault


async def _return(exchange: Exchange, response: aiohttp.ClientResponse) -> None:
    headers = [(name.lower(), value) for name, value in response.raw_headers]
    await exchange.start(response.status, [(name, value) for name, value in headers if name.decode("latin-1") not in _NOT_RETURNED])
    async for piece in response.content.iter_any():
        await exchange.write(piece)
    await exchange.write(b"", more=False)
