"""`/tiered_kv/prompts`: prompts that their callers send piece by piece.

POST opens one, PATCH appends or replaces from a point on, POST .../finish answers it as the route
would that takes it whole, GET says how far it is, DELETE forgets it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from weakref import WeakKeyDictionary

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from tiered_kv.api.pieces import IDLE_S, Book, PieceError, Prompt
from tiered_kv.plugin.prompts.ahead import Ahead
from tiered_kv.plugin.prompts.inner import REPLICA, Forwarded
from tiered_kv.plugin.upstream.current import arguments

PATH = "/tiered_kv/prompts"

OFF = "Prompts in pieces need --tiered-kv."
NOT_YET = "The server is still starting; ask again."
SEVERAL = (
    "Prompts in pieces need --tokenizer-worker-num 1: each worker has prompts of its own, and it "
    "is chance which one a piece reaches."
)
HANDED_OVER = (
    "Prompts in pieces need a server without --disaggregation-mode, which does all of a request; "
    "send the prompt whole."
)
STAGES = (
    "Prompts in pieces need a server without --pp-size above 1, which was not tried; send the "
    "prompt whole."
)


class Prompts:
    """Those of one tokenizer manager."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._book = Book()
        self._ahead: dict[str, Ahead] = {}
        self._replicas = arguments.replicas(manager.server_args)
        self._n_opened = 0
        self._page_size = manager.server_args.page_size

    def open(self, request: Request, body: object) -> Prompt:
        prompt = self._book.open(_owner(request), body, time.monotonic())
        if self._replicas > 1:
            # A replica's KV is its own. `/generate` reads the body, OpenAI's routes a header.
            prompt.rest.setdefault(REPLICA, self._n_opened % self._replicas)
            self._n_opened += 1
        self._sweep()
        self._ahead[prompt.prompt_id] = Ahead(prompt, self._manager, self._page_size)
        self._go_on(request, prompt)
        return prompt

    def change(self, request: Request, prompt_id: str, body: object) -> Prompt:
        prompt = self._book.change(_owner(request), prompt_id, body, time.monotonic())
        if isinstance(body, dict) and body.get("from") is not None:
            self._ahead[prompt_id].replaced()
        self._go_on(request, prompt)
        return prompt

    def finish(self, request: Request, prompt_id: str, body: object) -> tuple[str, dict[str, Any]]:
        found = self._book.finish(_owner(request), prompt_id, body, time.monotonic())
        self._ahead.pop(prompt_id).leave()
        return found

    def find(self, request: Request, prompt_id: str) -> Prompt:
        return self._book.find(_owner(request), prompt_id, time.monotonic())

    def drop(self, request: Request, prompt_id: str) -> None:
        self._book.drop(self.find(request, prompt_id))
        self._ahead.pop(prompt_id).stop()

    def told(self, prompt: Prompt) -> dict[str, Any]:
        """What a caller is told of an open prompt."""
        ahead = self._ahead[prompt.prompt_id]
        return {
            "id": prompt.prompt_id,
            "path": prompt.form.path,
            prompt.form.unit: len(prompt.content),
            "prefilled_tokens": ahead.prefilled_tokens,
            "refused": ahead.refused,
            "expires_in_s": IDLE_S,
        }

    def _go_on(self, request: Request, prompt: Prompt) -> None:
        self._ahead[prompt.prompt_id].go_on(request.scope)

    def _sweep(self) -> None:
        """Of prompts that the book has forgotten."""
        if len(self._ahead) >= 2 * len(self._book):
            open_now = self._book.ids()
            for prompt_id in self._ahead.keys() - open_now:
                self._ahead.pop(prompt_id).stop()


_prompts: WeakKeyDictionary[Any, Prompts] = WeakKeyDictionary()
"""By tokenizer manager: there is one in a process."""


def _owner(request: Request) -> str:
    """Whoever shows the same keys. They are kept nowhere."""
    shown = [
        request.headers.get(name, "") for name in ("authorization", "x-api-key", "x-slo-tenant")
    ]
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def add_routes(app: Any) -> None:
    """Have `app` (FastAPI) answer under PATH, once."""
    if any(getattr(route, "path", None) == PATH for route in app.routes):
        return
    for path, method, answer in (
        (PATH, "POST", open_prompt),
        (f"{PATH}/{{prompt_id}}", "PATCH", change_prompt),
        (f"{PATH}/{{prompt_id}}", "GET", show_prompt),
        (f"{PATH}/{{prompt_id}}", "DELETE", drop_prompt),
        (f"{PATH}/{{prompt_id}}/finish", "POST", finish_prompt),
    ):
        app.add_api_route(path, answer, methods=[method], response_model=None)


async def open_prompt(request: Request) -> Response:
    """Opens a prompt with what is there of it, as the body of its route."""

    def opened(prompts: Prompts, body: object) -> Response:
        return JSONResponse(prompts.told(prompts.open(request, body)), HTTPStatus.CREATED)

    return await _answered(request, opened)


async def change_prompt(request: Request, prompt_id: str) -> Response:
    """Appends a piece, or puts it in place of what comes after `from`."""

    def changed(prompts: Prompts, body: object) -> Response:
        return JSONResponse(prompts.told(prompts.change(request, prompt_id, body)))

    return await _answered(request, changed)


async def show_prompt(request: Request, prompt_id: str) -> Response:
    """How far it is."""

    def shown(prompts: Prompts, body: object) -> Response:
        return JSONResponse(prompts.told(prompts.find(request, prompt_id)))

    return await _answered(request, shown)


async def drop_prompt(request: Request, prompt_id: str) -> Response:
    """Forgets it; its KV stays, as everybody's does."""

    def dropped(prompts: Prompts, body: object) -> Response:
        prompts.drop(request, prompt_id)
        return Response(status_code=HTTPStatus.NO_CONTENT)

    return await _answered(request, dropped)


async def finish_prompt(request: Request, prompt_id: str) -> Response:
    """The answer of the prompt's route, streamed or not."""

    def finished(prompts: Prompts, body: object) -> Any:
        return Forwarded(*prompts.finish(request, prompt_id, body))

    return await _answered(request, finished)


async def _answered(request: Request, act: Callable[[Prompts, object], Any]) -> Any:
    """What `act` answers, or one sentence that says why not."""
    try:
        return act(_prompts_here(), await _body(request))
    except PieceError as error:
        return JSONResponse({"error": {"message": str(error)}}, status_code=error.status)


async def _body(request: Request) -> object:
    """Decoded. An empty one is no fields."""
    raw = await request.body()
    try:
        return json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        raise PieceError("the body must be JSON.") from None


def _prompts_here() -> Prompts:
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    if state is None:
        raise PieceError(NOT_YET, HTTPStatus.SERVICE_UNAVAILABLE)
    manager = state.tokenizer_manager
    if not getattr(manager.server_args, "tiered_kv", False):
        raise PieceError(OFF, HTTPStatus.NOT_FOUND)
    if manager.server_args.tokenizer_worker_num > 1:
        raise PieceError(SEVERAL, HTTPStatus.NOT_IMPLEMENTED)
    if manager.server_args.disaggregation_mode != "null":
        raise PieceError(HANDED_OVER, HTTPStatus.NOT_IMPLEMENTED)
    if manager.server_args.pp_size > 1:
        raise PieceError(STAGES, HTTPStatus.NOT_IMPLEMENTED)
    if manager not in _prompts:
        _prompts[manager] = Prompts(manager)
    return _prompts[manager]
