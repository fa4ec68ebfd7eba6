"""`GET /tiered_kv/snapshot`: what the scheduler notes of itself, for those who may administrate.

One question to the scheduler at a time, and none while the last answer is fresh: ten viewers cost
it no more than one. The question travels as SGLang's own for its internal state does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from sglang.srt.utils.auth import AuthLevel, auth_level, decide_request_auth

from tiered_kv.plugin.options.watching import OPTION
from tiered_kv.plugin.snapshots.collect import PART_KEY, PARTS
from tiered_kv.snapshot.schema import shaped

logger = logging.getLogger(__name__)

PATH = "/tiered_kv/snapshot"
#: A snapshot is served again until it is so old.
FRESH_S = 0.25
#: How long a caller waits for one: a forward pass on a CPU takes seconds.
PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Sentences:
    """What those are told who are not answered: where nobody is, without a key, from a page."""

    off: str
    no_key: str
    browser: str


SENTENCES = Sentences(
    off=f"This server shows no snapshots; start it with --admin-api-key, or with {OPTION} on if "
    "all who reach it may see what is cached and who waits.",
    no_key="Snapshots are for administrators; send the server's --admin-api-key (its --api-key if "
    "it has no other) as a bearer token.",
    browser="Snapshots are not for other sites' pages; look at them through python -m "
    "tiered_kv.view.",
)
NOT_YET = "The server is still starting; ask again."
BUSY = (
    f"The scheduler has not answered within {PATIENCE_S:.0f} s: it computes a long forward pass, "
    "or hangs; ask again."
)
NOTHING = "The scheduler keeps nothing to show; see its log."


class Refusal(Exception):  # noqa: N818 - an answer, not a failure
    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class SnapshotSource:
    """The last snapshot of one tokenizer manager, and the question for the next one."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._asking: asyncio.Task[None] | None = None
        self._shaped: dict[str, Any] | None = None
        self._taken_s = -1.0e9

    async def latest(self) -> dict[str, Any]:
        """One that is fresh. Raises Refusal."""
        if time.monotonic() - self._taken_s >= FRESH_S:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
            # Not cancelled when the caller is out of patience: the answer would go to whoever asks
            # for the internal state next.
            try:
                await asyncio.wait_for(asyncio.shield(self._asking), PATIENCE_S)
            except TimeoutError:
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, BUSY) from None
        if self._shaped is None:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, NOTHING)
        return self._shaped

    async def _ask(self) -> None:
        from sglang.srt.managers.io_struct import GetInternalStateReq

        manager = self._manager
        manager.auto_create_handle_loop()
        raw: dict[str, Any] = {}
        for part in PARTS:
            ask = manager.get_internal_state_communicator
            answers = await ask(GetInternalStateReq(rid=part))
            for answer in answers:  # one of each replica, the first of which has something to say
                raw |= answer.internal_state.get(PART_KEY, {})
        self._taken_s = time.monotonic()
        if not raw:
            self._shaped = None
            return
        has_text = manager.server_args.tiered_kv_view_text_tokens and manager.tokenizer is not None
        self._shaped = shaped(raw, at_s=time.time(), decode=self._decode if has_text else None)
        self._shaped["model"] = manager.server_args.served_model_name

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._manager.tokenizer.decode(list(ids)))


_sources: dict[int, SnapshotSource] = {}
"""By the tokenizer manager's id: there is one in a process."""


def add_route(app: Any) -> None:
    """Have `app` (FastAPI) answer under PATH, once."""
    if all(getattr(route, "path", None) != PATH for route in app.routes):
        app.add_api_route(PATH, answer, methods=["GET"])


# Without the mark, SGLang would ask for the --api-key where there is an --admin-api-key, too.
@auth_level(AuthLevel.ADMIN_OPTIONAL)
async def answer(request: Request) -> JSONResponse:
    """The snapshot, or one sentence that says why not."""
    try:
        return JSONResponse(await _snapshot(request), headers={"Cache-Control": "no-store"})
    except Refusal as refusal:
        return JSONResponse({"error": str(refusal)}, status_code=refusal.status)


async def _snapshot(request: Request) -> dict[str, Any]:
    manager = manager_here()
    check(request, manager.server_args)
    source = _sources.get(id(manager))
    if source is None:
        source = _sources[id(manager)] = SnapshotSource(manager)
    return await source.latest()


def manager_here() -> Any:
    """This process' tokenizer manager. Raises Refusal while there is none."""
    from sglang.srt.entrypoints.http_server import get_global_state

    state = get_global_state()
    if state is None:
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, NOT_YET)
    return state.tokenizer_manager


def check(
    request: Request, server_args: Any, *, path: str = PATH, sentences: Sentences = SENTENCES
) -> None:
    """Raise Refusal unless this request, to `path`, is an administrator's."""
    if not getattr(server_args, "tiered_kv", False) or server_args.tiered_kv_view != "on":
        raise Refusal(HTTPStatus.FORBIDDEN, sentences.off)
    # SGLang allows every origin, and a browser's user may reach what its pages' authors may not.
    if request.headers.get("origin") or request.headers.get("sec-fetch-site") == "cross-site":
        raise Refusal(HTTPStatus.FORBIDDEN, sentences.browser)
    # Checked here as well as by SGLang, which does not with several tokenizer workers.
    decision = decide_request_auth(
        method=request.method,
        path=path,
        authorization_header=request.headers.get("authorization"),
        api_key=server_args.api_key,
        admin_api_key=server_args.admin_api_key,
        auth_level=AuthLevel.ADMIN_OPTIONAL,
    )
    if not decision.allowed:
        raise Refusal(HTTPStatus(decision.error_status_code), sentences.no_key)
    if request.query_params:
        raise Refusal(HTTPStatus.BAD_REQUEST, f"{path} takes no parameters; leave them out.")
