"""The page's own server: static files, and the frames as server-sent events.

The browser talks to nobody else: the server's key stays here, and its address need not allow other
origins. Everything the page needs comes from this package, so it works without a network.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiered_kv.view.hub import Hub

STATIC = Path(__file__).parent / "static"
#: Nothing from elsewhere, whatever a name in a snapshot may look like.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class _Headers:
    """Puts `_HEADERS` on every response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [h for h in message["headers"] if h[0] != b"cache-control"]
                message["headers"] = [*kept, *_HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)


def make_page(hub: Hub, hosts: Sequence[str]) -> Starlette:
    """hosts: the names by which a browser may call it; "*": any."""

    async def index(_: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def about(_: Request) -> Response:
        return JSONResponse({**hub.about, "history": hub.frames.history})

    async def events(_: Request) -> Response:
        return StreamingResponse(_events(hub), media_type="text/event-stream")

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        hub.start()
        yield
        await hub.stop()

    return Starlette(
        routes=[
            Route("/", index),
            Route("/about", about),
            Route("/events", events),
            Mount("/static", StaticFiles(directory=STATIC)),
        ],
        middleware=[
            # A page elsewhere must not reach this one by a name of its own.
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
            Middleware(_Headers),
        ],
        lifespan=lifespan,
    )


async def _events(hub: Hub) -> AsyncIterator[str]:
    # How long a browser waits before it connects again.
    yield "retry: 1000\n\n"
    async for frame in hub.watch():
        yield f"data: {_json(frame)}\n\n"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
