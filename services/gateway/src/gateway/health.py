"""Probes, which need no key, and metrics, which do: without one they are on a port of their own, see :mod:`gateway.__main__`."""

from __future__ import annotations

import asyncio
from typing import Literal

import aiohttp
from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from gateway.web import Services, services
from parampara.http import DOCS_PATHS

PUBLIC_PATHS = frozenset({"/health", "/livez", "/readyz"} | DOCS_PATHS)
_TIMEOUT = aiohttp.ClientTimeout(total=2)
router = APIRouter(tags=["Health"])

State = Literal["ok", "away", "none"]


class Health(BaseModel):
    status: Literal["ok", "degraded", "unavailable"]
    """``degraded``: the gateway answers, but a part behind it is away. A model server that nobody deployed to yet is ``none``."""
    database: State
    control_plane: State
    embedder: State
    model_server: State


@router.get("/livez", summary="The process lives")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Ready for requests", responses={503: {}})
async def readyz(request: Request, response: Response) -> dict[str, str]:
    """200 while keys and aliases are fresh enough to serve with. Needs no model: without one, requests get a clear 404 or 503."""
    ready = _database(services(request)) == "ok"
    response.status_code = 200 if ready else 503
    return {"status": "ready" if ready else "database away"}


@router.get("/health", summary="The gateway and what is behind it", responses={503: {"model": Health}})
async def health(request: Request, response: Response) -> Health:
    parts = services(request)
    gateway = parts.settings.gateway
    urls = sorted({alias.url for alias in parts.directory.snapshot.aliases.values() if alias.model is not None})
    control_plane, embedder, *models = await asyncio.gather(
        _answers(request, f"{gateway.control_plane_url}/livez"),
        _answers(request, f"{gateway.embedder_url}/health"),
        *(_answers(request, f"{url}/health") for url in urls),
    )
    database = _database(parts)
    model_server: State = "none" if not models else "ok" if all(models) else "away"
    complete = control_plane and embedder and model_server != "away"
    response.status_code = 200 if database == "ok" else 503
    return Health(
        status="unavailable" if database != "ok" else "ok" if complete else "degraded",
        database=database,
        control_plane="ok" if control_plane else "away",
        embedder="ok" if embedder else "away",
        model_server=model_server,
    )


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _database(parts: Services) -> Literal["ok", "away"]:
    return "ok" if parts.directory.age <= parts.settings.gateway.max_stale_seconds else "away"


async def _answers(request: Request, url: str) -> bool:
    client: aiohttp.ClientSession = services(request).client
    try:
        async with client.get(url, timeout=_TIMEOUT) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
