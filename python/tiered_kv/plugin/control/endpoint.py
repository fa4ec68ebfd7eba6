"""`POST /tiered_kv/cache`: orders about the KV of a prompt, for those who may administrate."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from sglang.srt.utils.auth import AuthLevel, auth_level

from tiered_kv.api.cache_order import CacheOrder, parse_order
from tiered_kv.api.fields import TermsError
from tiered_kv.plugin.control.orders import Orders, Subject
from tiered_kv.plugin.control.prompts import tokens_of
from tiered_kv.plugin.options.watching import OPTION
from tiered_kv.plugin.snapshots.endpoint import Refusal, Sentences, check, manager_here

PATH = "/tiered_kv/cache"
#: Enough for a prompt of a million tokens.
BODY_MAX = 16 << 20

SENTENCES = Sentences(
    off="This server takes no orders about its cache; start it with --admin-api-key, or with "
    f"{OPTION} on if all who reach it may look at it and act.",
    no_key="Orders about the cache are for administrators; send the server's --admin-api-key (its "
    "--api-key if it has no other) as a bearer token.",
    browser="Orders are not for other sites' pages; give them by python -m tiered_kv.cache.",
)
TOO_LARGE = f"The body has more than {BODY_MAX >> 20} MiB; no prompt is so long."
NO_JSON = 'The body must be JSON such as {"action": "inspect", "text": "..."}.'

_orders: dict[int, Orders] = {}
"""By the tokenizer manager's id: there is one in a process."""


def add_route(app: Any) -> None:
    """Have `app` (FastAPI) answer under PATH, once."""
    if all(getattr(route, "path", None) != PATH for route in app.routes):
        app.add_api_route(PATH, answer, methods=["POST"])


# Without the mark, SGLang would ask for the --api-key where there is an --admin-api-key, too.
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def answer(request: Request) -> JSONResponse:
    """What was done, or one sentence that says why nothing was."""
    try:
        done = await _carry_out(request)
        return JSONResponse(done, headers={"Cache-Control": "no-store"})
    except Refusal as refusal:
        return JSONResponse({"error": str(refusal)}, status_code=refusal.status)
    except TermsError as error:
        return JSONResponse({"error": str(error)}, status_code=HTTPStatus.BAD_REQUEST)


async def _carry_out(request: Request) -> dict[str, Any]:
    manager = manager_here()
    args = manager.server_args
    check(request, args, path=PATH, sentences=SENTENCES)
    order = parse_order(
        await _json(request),
        most_seconds=args.tiered_kv_keep_seconds,
        most_tokens=manager.context_len,
    )
    orders = _orders.get(id(manager))
    if orders is None:
        orders = _orders[id(manager)] = Orders(manager)
    if order.session_id is not None:
        return await orders.carry_out(order, Subject())
    chat = getattr(request.app.state, "openai_serving_chat", None)
    tokens = await tokens_of(order, manager, chat, request)
    lora_id = await _adapter(order, manager)
    try:
        return await orders.carry_out(order, Subject(tokens, lora_id))
    finally:
        if lora_id is not None:
            await manager.lora_registry.release(lora_id)


async def _adapter(order: CacheOrder, manager: Any) -> str | None:
    """SGLang's id of the adapter that the order names; it is to be released."""
    if order.lora_path is None:
        return None
    try:
        lora_id: str = await manager.lora_registry.acquire(order.lora_path)
    except ValueError:
        raise TermsError(
            f"lora_path {order.lora_path!r} names no adapter that is loaded."
        ) from None
    return lora_id


async def _json(request: Request) -> object:
    """The decoded body. Raises TermsError."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_MAX:
            raise TermsError(TOO_LARGE)
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise TermsError(NO_JSON) from None
