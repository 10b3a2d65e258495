"""Probes, which need no key, and metrics, which do: without one they are on a port of their own, see :mod:`control_plane.server`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from control_plane.dependencies import SessionsDep, SettingsDep
from control_plane.services import health
from parampara.schemas.api import Readiness

router = APIRouter(tags=["Health"])


@router.get("/livez", summary="The process lives")
async def livez() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Ready for requests", responses={503: {"model": Readiness}})
@router.get("/health", summary="Same as /readyz", responses={503: {"model": Readiness}})
def readyz(sessions: SessionsDep, settings: SettingsDep, response: Response) -> Readiness:
    """200 while the database answers and is migrated, else 503; Redis is shown but not required."""
    readiness = health.readiness(sessions, settings)
    response.status_code = 200 if readiness.status == "ready" else 503
    return readiness


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
def metrics(sessions: SessionsDep, settings: SettingsDep) -> Response:
    return Response(generate_latest() + health.gauges(sessions, settings), media_type=CONTENT_TYPE_LATEST)
