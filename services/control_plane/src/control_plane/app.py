"""The control plane as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from sqlalchemy.orm import Session, sessionmaker
from starlette.concurrency import run_in_threadpool

from control_plane.auth import Authentication
from control_plane.ringing import Ringer
from control_plane.routers import aliases, artifacts, deployments, files, health, jobs, keys, runs
from control_plane.uploads import FORM_OVERHEAD_BYTES
from parampara.http import install_docs, install_error_handlers
from parampara.keys import read_pepper
from parampara.schemas.api import ErrorBody
from parampara.settings import Settings

MAX_BODY_BYTES = 1_048_576
_DESCRIPTION = """
Files, runs, jobs, artifacts, deployments and keys of Parampara.

A **run** takes a base model through DAPT, merge, SFT, merge, quantization, evaluation and deployment, as its **recipe**
declares; where that asks for DPO, preferences are learnt before the last merge. Upload books, Q&A and preferences with
`POST /v1/files`, start the run with `POST /v1/runs`, follow it on `/v1/runs/{id}/events/stream`, then chat with its alias
through the gateway.

Send `Authorization: Bearer <key>` with every request. Errors have one form everywhere:
`{"error": {"message", "type", "param", "code"}}`. Lists are walked with `after=<last_id>` until `has_more` is false.
"""
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}}
    for status, description in {
        400: "The request can never succeed; `param` names the field.",
        401: "No API key, or one that is not known.",
        403: "The key lacks the scope.",
        404: "No such object.",
    }.items()
}


class ControlPlane(FastAPI):
    """FastAPI with the error shape in its schema, instead of the 422 that is never sent."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = super().openapi()
            for operation in (operation for methods in schema["paths"].values() for operation in methods.values()):
                operation["responses"].pop("422", None)
            components = schema["components"]["schemas"]
            components.pop("HTTPValidationError", None)
            components.pop("ValidationError", None)
            error = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
            components |= {**error.pop("$defs"), "ErrorBody": error}
        return super().openapi()


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    await run_in_threadpool(app.state.ringer.close)


def create_app(settings: Settings, sessions: sessionmaker[Session]) -> FastAPI:
    """The whole API over one database; starts no thread and touches no table by itself."""
    app = ControlPlane(title="Parampara control plane", version="0.1.0", description=_DESCRIPTION, redoc_url=None, docs_url=None)
    app.state.settings = settings
    app.state.sessions = sessions
    app.state.pepper = read_pepper(settings)
    app.state.ringer = Ringer(settings, sessions)
    app.state.stopping = False
    app.include_router(health.router)
    for module in (files, runs, jobs, artifacts, deployments, aliases, keys):
        app.include_router(module.router, responses=_ERRORS)
    install_docs(app)
    app.add_middleware(Authentication, sessions=sessions, pepper=app.state.pepper)
    install_error_handlers(
        app,
        service="control_plane",
        max_body_bytes=MAX_BODY_BYTES,
        larger_bodies={"/v1/files": settings.max_upload_bytes + FORM_OVERHEAD_BYTES},
    )
    return app
