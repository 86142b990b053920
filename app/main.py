"""The API: ``create_app()`` puts the rooms together. Never imports torch."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from app import apidocs, health, http
from app.aliases.router import router as aliases
from app.artifacts.router import router as artifacts
from app.capabilities.router import router as capabilities
from app.db import Database
from app.deployments.manners import Manners
from app.deployments.router import router as deployments
from app.deps import Rooms, RoomsDep
from app.discovery import discover
from app.files.router import router as files
from app.fleet.router import router as fleet
from app.gateway.desk import Desk
from app.gateway.limits import Limiter
from app.gateway.proxy import EngineClient
from app.gateway.router import router as gateway
from app.jobs.router import router as jobs
from app.jobs.stream import Tailer
from app.openai.router import router as openai
from app.pipelines.router import router as pipelines
from app.projects.caller import KeyLimits
from app.projects.router import router as keys
from app.projects.service import KeyRing
from app.queue import AnyDoorbell, SilentDoorbell
from app.settings import Settings
from app.storage import Storage
from app.sweeps.router import router as sweeps
from app.usage.meter import Meter
from app.usage.router import router as usage

DESCRIPTION = """\
Fine-tune, merge, prove and serve language models on your own GPUs.

`POST /files`, then `POST /jobs`, follow `/jobs/{id}/stream`, and chat through `/v1` with any OpenAI client.
Every route but `/healthz` and `/readyz` needs `Authorization: Bearer <key>`; `x-api-key: <key>` does as well.
Errors are always `{"error": {"message", "type", "param", "code", "hint"}}`.
"""


def create_app(
    settings: Settings | None = None, doorbell: AnyDoorbell | None = None, broker_url: str | None = None
) -> FastAPI:
    """The application; limits are counted at ``broker_url`` where that is a Redis. Raises CatalogError."""
    settings = settings or Settings()
    database = Database(settings.database)
    rooms = Rooms(
        settings=settings,
        database=database,
        catalog=discover(settings.packages),
        storage=Storage(settings.data_dir),
        doorbell=doorbell or SilentDoorbell(),
        keys=KeyRing(database),
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.tailer = Tailer(database)
        app.state.desk = Desk(
            EngineClient(Manners(database, settings), wake_seconds=settings.wake_seconds),
            Limiter(_limits(settings), broker_url),
            Meter(database),
        )
        async with app.state.desk.open():
            yield
            app.state.stopping = True
            await app.state.tailer.close()
        rooms.doorbell.close()
        database.close()

    app = FastAPI(title="Tunesmith", version="0.1.0", description=DESCRIPTION, lifespan=lifespan, openapi_url=None)
    app.state.rooms = rooms
    app.state.stopping = False
    http.install(app)
    app.add_middleware(http.Guard, settings=settings)
    native = (jobs, pipelines, sweeps, files, artifacts, aliases, deployments, fleet, capabilities, usage, keys)
    # Routers are tried in this order, and nobody is in such a hurry as those who chat.
    for router in (gateway, openai, *native):
        app.include_router(router)
    _add_health(app)
    _add_schemas(app, rooms)
    apidocs.add(app, rooms)
    return app


def _limits(settings: Settings) -> KeyLimits:
    return KeyLimits(settings.key_requests_per_minute, settings.key_tokens_per_minute, settings.key_concurrent_requests)


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", tags=["health"], summary="Is the process alive?")
    async def healthz() -> dict[str, str]:
        """Answers without touching anything."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], summary="Can it take work?", responses={503: {"model": health.Readiness}})
    def readyz(request: Request, rooms: RoomsDep) -> JSONResponse:
        """503 only when jobs cannot be accepted; a missing broker or worker shows as `degraded`."""
        state = health.readiness(rooms.settings, rooms.database, rooms.doorbell, stopping=request.app.state.stopping)
        return JSONResponse(state.model_dump(), 200 if state.ready else 503)


def _add_schemas(app: FastAPI, rooms: Rooms) -> None:
    """Puts the union of all job specs into the OpenAPI document, and the error object on every route."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            schema = rooms.catalog.schema_adapter().json_schema(ref_template="#/components/schemas/{model}")
            schemas = document["components"]["schemas"]
            schemas |= schema.pop("$defs")
            schemas["JobSpec"] = _with_names(schema, schemas)
            schemas["Error"] = _ERROR
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for operation in [operation for path in document["paths"].values() for operation in path.values()]:
                operation["responses"].pop("422", None)
                operation["responses"].setdefault("4XX", _ERROR_RESPONSE)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _with_names(union: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Names the unions within a union: a discriminator maps to names alone in OpenAPI; pydantic writes them out."""
    mapping = union["discriminator"]["mapping"]
    for value, inner in mapping.items():
        if isinstance(inner, dict):
            name = f"{value.title()}Spec"
            assert name not in schemas
            schemas[name] = inner
            mapping[value] = f"#/components/schemas/{name}"
            union["oneOf"] = [{"$ref": mapping[value]} if one == inner else one for one in union["oneOf"]]
    return union


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "Path of the field at fault."},
                "code": {"type": "string"},
                "hint": {"type": "string", "description": "What to do."},
            },
        }
    },
}
_ERROR_RESPONSE = {
    "description": "The request is at fault",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
