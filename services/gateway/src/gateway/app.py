"""The gateway as one ASGI application: authenticate, then the token path, the control plane, or the FastAPI part."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

import aiohttp
import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import metrics
from gateway.admission import Admission
from gateway.application import make_web
from gateway.completions import Completions
from gateway.database import Database
from gateway.directory import Directory
from gateway.embeddings import Embeddings
from gateway.exchange import ClientGone, Exchange, Handler, refuse_large_headers
from gateway.health import PUBLIC_PATHS
from gateway.passthrough import Passthrough, belongs_to_control_plane
from gateway.retrieval import Retriever
from gateway.ringing import Ringer
from gateway.upstream import ModelServers, make_client
from gateway.web import Services
from parampara.errors import ParamparaError
from parampara.keys import read_pepper
from parampara.settings import Settings

log = structlog.get_logger("gateway")


class MethodNotAllowed(ParamparaError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    headers = {"Allow": "POST"}


@dataclass(frozen=True)
class _Running:
    """What lives as long as the application runs."""

    client: aiohttp.ClientSession
    database: Database
    directory: Directory
    ringer: Ringer
    token_path: Mapping[str, Handler]
    passthrough: Passthrough
    web: ASGIApp

    async def close(self) -> None:
        await self.directory.close()
        await self.client.close()
        self.ringer.close()
        self.database.close()


class Gateway:
    """One instance per process; everything is opened by the lifespan."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admission = Admission(settings.gateway)
        self._running: _Running | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            await self._serve(Exchange(scope, receive, send))

    async def _serve(self, exchange: Exchange) -> None:
        started = time.perf_counter()
        try:
            await self._route(exchange)
        except ClientGone:
            metrics.DISCONNECTS.inc()
            exchange.status = 499
        except ParamparaError as error:
            await exchange.fail(error)
        except asyncio.CancelledError:  # the server stops
            raise
        except Exception as error:  # the HTTP boundary
            log.exception("request failed", request_id=exchange.request_id, route=exchange.route)
            await exchange.fail(error)
        finally:
            self._account(exchange, time.perf_counter() - started)

    async def _route(self, exchange: Exchange) -> None:
        running = self._running
        assert running is not None, "the server calls the lifespan first"
        refuse_large_headers(exchange.scope)
        if exchange.path in PUBLIC_PATHS:
            exchange.route = exchange.path
            await self._to_web(running, exchange)
            return
        exchange.principal = await running.directory.authenticate(exchange.header(b"authorization"))
        handler = running.token_path.get(exchange.path)
        if handler is not None:
            exchange.route = exchange.path
            await self._spend_tokens(exchange, handler)
        elif belongs_to_control_plane(exchange.path):
            exchange.route = "/v1/" + exchange.path.split("/")[2]
            await running.passthrough.forward(exchange)
        else:
            await self._to_web(running, exchange)

    async def _spend_tokens(self, exchange: Exchange, handler: Handler) -> None:
        if exchange.method != "POST":
            raise MethodNotAllowed(f"{exchange.path} takes POST, not {exchange.method[:20]}.")
        assert exchange.principal is not None
        exchange.principal.require("chat")
        with self._admission.admit(exchange.principal.key_id):
            await handler(exchange)

    async def _to_web(self, running: _Running, exchange: Exchange) -> None:
        headers = [(name, value) for name, value in exchange.scope["headers"] if name != b"x-request-id"]
        scope = {
            **exchange.scope,
            "headers": [*headers, (b"x-request-id", exchange.request_id.encode())],
            "parampara.principal": exchange.principal,
        }
        await running.web(scope, exchange.receive, exchange.send)
        if exchange.route == "unmatched":
            exchange.route = getattr(scope.get("route"), "path", "unmatched")

    def _account(self, exchange: Exchange, seconds: float) -> None:
        metrics.REQUESTS.labels(exchange.route, str(exchange.status)).inc()
        metrics.SECONDS.labels(exchange.route).observe(seconds)
        if exchange.path in PUBLIC_PATHS:
            return
        log.info(
            "request",
            request_id=exchange.request_id,
            method=exchange.method[:20],
            route=exchange.route,
            status=exchange.status,
            ms=round(seconds * 1000, 1),
            key=exchange.principal.key_id if exchange.principal else None,
            model=exchange.model,
        )

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            self._running = await self._open()
        except Exception as error:  # the process boundary: uvicorn prints it and exits
            log.exception("gateway can not start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self._running.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self) -> _Running:
        settings, pepper = self._settings, read_pepper(self._settings)
        client, database = make_client(settings.gateway), Database(settings)
        directory = Directory(database, pepper=pepper, settings=settings.gateway)
        retriever = Retriever(client, database, settings)
        completions = Completions(directory, ModelServers(client, settings.gateway), retriever, settings, pepper=pepper)
        ringer = Ringer(settings, database.sessions)
        ringer.start()
        await directory.start()
        return _Running(
            client=client,
            database=database,
            directory=directory,
            ringer=ringer,
            token_path={
                "/v1/chat/completions": completions.chat,
                "/v1/completions": completions.complete,
                "/v1/embeddings": Embeddings(client, settings).embed,
            },
            passthrough=Passthrough(client, directory, settings),
            web=make_web(Services(settings, database, directory, retriever, ringer, client)),
        )
