"""Requests that the HTTP server sends to its own routes, through all that a caller's pass."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

REPLICA = "routed_dp_rank"
"""The field of a body that names the data-parallel replica,"""
_REPLICA_HEADER = b"x-data-parallel-rank"
"""and the header."""

#: What of a request's scope is its own and not that of the one which is made of it: its route, what
#: hooks have read of its body, its response.
_OWN = ("route", "endpoint", "path_params", "fastapi_inner_astack", "fastapi_function_astack")
_OWN_PREFIX = "tiered_kv_"


def request_of(
    outer: Scope, path: str, body: dict[str, Any], **more: Any
) -> tuple[dict[str, Any], bytes]:
    """(ASGI scope, body as it is sent) of a POST of `body` to `path` by who sent `outer`."""
    sent = json.dumps(body).encode()
    scope = {
        key: value
        for key, value in outer.items()
        if key not in _OWN and key != "tiered_kv" and not key.startswith(_OWN_PREFIX)
    }
    kept = [
        (name, value)
        for name, value in outer["headers"]
        if name not in (b"content-length", b"content-type", b"transfer-encoding")
    ]
    headers = [*kept, (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(sent)).encode()))
    if body.get(REPLICA) is not None:
        headers.append((_REPLICA_HEADER, str(body[REPLICA]).encode()))
    inner = {
        **scope,
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": headers,
        **more,
    }
    return inner, sent


def receive_of(body: bytes, later: Receive) -> Receive:
    """Gives `body`, and then what `later` does: that the caller has gone."""
    bodies = [body]

    async def receive() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        return await later()

    return receive


async def never() -> Message:
    """Of a request that nobody can leave."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class Forwarded(Response):
    """A response that another route of the same server gives."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        super().__init__()
        self._path, self._body = path, body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        inner, sent = request_of(scope, self._path, self._body)
        await scope["app"].router(inner, receive_of(sent, receive), send)


async def answer_of(outer: Scope, path: str, body: dict[str, Any], **more: Any) -> tuple[int, Any]:
    """(status, decoded body) of the answer of route `path` to `body`, sent by who sent `outer`."""
    status, chunks = 500, list[bytes]()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        chunks.append(message.get("body", b""))

    inner, sent = request_of(outer, path, body, **more)
    await outer["app"].router(inner, receive_of(sent, never), send)
    try:
        return status, json.loads(b"".join(chunks))
    except ValueError:
        return status, None
