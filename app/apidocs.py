"""``/openapi.json`` and ``/docs``: behind a key like everything else, which a browser can give as a password."""

import base64
import binascii
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse

from app.deps import Rooms, presented
from app.errors import Unauthorized


def add(app: FastAPI, rooms: Rooms) -> None:
    """Adds both routes."""

    def check(request: Request) -> None:
        header = presented(request.headers)
        caller = rooms.keys.check(_from_basic(header) if header is not None else None)
        assert caller.key_id

    def guarded(request: Request, page: Any) -> Any:
        try:
            check(request)
        except Unauthorized as error:
            # A browser asks for name and password: any name, and the key.
            headers = {"www-authenticate": 'Basic realm="Tunesmith: any name, the API key as password"'}
            return JSONResponse(error.as_object(), error.status, headers)
        return page()

    @app.get("/openapi.json", include_in_schema=False)
    def openapi(request: Request) -> Any:
        return guarded(request, lambda: JSONResponse(app.openapi()))

    @app.get("/docs", include_in_schema=False)
    def docs(request: Request) -> HTMLResponse:
        page: HTMLResponse = guarded(
            request, lambda: get_swagger_ui_html(openapi_url="/openapi.json", title="Tunesmith")
        )
        return page


def _from_basic(header: str) -> str:
    """``Basic <name:key>`` as ``Bearer <key>``; anything else as it is."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() != "basic":
        return header
    try:
        _, _, key = base64.b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return header
    return f"Bearer {key}"
