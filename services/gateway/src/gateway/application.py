"""Puts the FastAPI part together."""

from __future__ import annotations

from fastapi import FastAPI

from gateway.health import router as health
from gateway.models import router as models
from gateway.openapi import describe
from gateway.vector_stores.routes import router as vector_stores
from gateway.web import Services
from parampara.http import install_error_handlers


def make_web(parts: Services) -> FastAPI:
    """The application without its keys: :mod:`gateway.app` authenticates before it calls this."""
    app = FastAPI(title="Parampara", version="0.1.0", redoc_url=None, openapi_url=None, docs_url=None)
    app.state.services = parts
    for router in (models, vector_stores, health):
        app.include_router(router)
    describe(app)
    install_error_handlers(app, service="gateway", max_body_bytes=parts.settings.gateway.max_body_bytes)
    return app
