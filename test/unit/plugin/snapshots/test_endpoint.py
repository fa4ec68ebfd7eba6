"""Who is given a snapshot, what the others are told, and what a snapshot costs with many viewers.

The scheduler is a coroutine here; SGLang's own communicator carries the question.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from fastapi import FastAPI
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import GetInternalStateReq, GetInternalStateReqOutput

from benchmark.micro.snapshot import Scheduler
from tiered_kv.plugin.snapshots import endpoint
from tiered_kv.plugin.snapshots.collect import PART_KEY, PARTS
from tiered_kv.plugin.snapshots.endpoint import PATH

ARGS = {
    "tiered_kv": True,
    "tiered_kv_view": "on",
    "tiered_kv_view_text_tokens": 0,
    "api_key": None,
    "admin_api_key": None,
    "served_model_name": "demo",
}


class Manager:
    """What of SGLang's TokenizerManager is used; `take` makes what the scheduler notes."""

    def __init__(
        self,
        take: Callable[[str], dict[str, Any] | None],
        silent: tuple[bool, ...] = (False,),
        **args: Any,
    ) -> None:
        """silent: of each replica, in the order in which they answer, whether it keeps nothing."""
        self.server_args = SimpleNamespace(**{**ARGS, **args})
        self.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
        self.asked = 0
        self.delay_s = 0.0
        self._take = take
        self._silent = silent
        self.get_internal_state_communicator: Any = FanOutCommunicator(self._send, len(silent))

    def auto_create_handle_loop(self) -> None:
        pass

    def _send(self, request: GetInternalStateReq) -> None:
        assert request.rid in PARTS
        self.asked += 1
        asyncio.get_running_loop().call_later(self.delay_s, self._answer, request.rid)

    def _answer(self, part: str) -> None:
        raw = self._take(part)
        for is_silent in self._silent:
            state = {} if raw is None or is_silent else {PART_KEY: raw}
            self.get_internal_state_communicator.handle_recv(
                GetInternalStateReqOutput(internal_state=state)
            )


@pytest.fixture(scope="module")
def scheduler() -> Scheduler:
    return Scheduler("slack", 60, 5, n_documents=3)


@pytest.fixture
def serve(
    monkeypatch: pytest.MonkeyPatch, scheduler: Scheduler
) -> Callable[..., tuple[FastAPI, Manager]]:
    from sglang.srt.entrypoints import http_server

    def take(part: str) -> dict[str, Any]:
        look = scheduler.part()
        return look.forest() if part == PARTS[0] else look.requests()

    def make(**args: Any) -> tuple[FastAPI, Manager]:
        manager = Manager(take, **args)
        monkeypatch.setattr(
            http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager)
        )
        monkeypatch.setattr(endpoint, "_sources", {})
        app = FastAPI()
        endpoint.add_route(app)
        endpoint.add_route(app)
        return app, manager

    return make


def get(app: FastAPI, path: str = PATH, **headers: str) -> httpx.Response:
    return asyncio.run(_get(app, path, **headers))


async def _get(app: FastAPI, path: str = PATH, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.get(path, headers={k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize("silent", [(False, True), (True, False)], ids=str)
def test_one_of_several_replicas_has_something_to_say(serve: Any, silent: Any) -> None:
    app, _ = serve(silent=silent)
    assert get(app).json()["model"] == "demo"


def test_a_snapshot(serve: Any) -> None:
    app, _ = serve()
    assert sum(getattr(route, "path", "") == PATH for route in app.routes) == 1
    response = get(app)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    snapshot = response.json()
    assert (snapshot["version"], snapshot["model"]) == (1, "demo")
    assert len(snapshot["forest"]["prefixes"]) == 60
    assert abs(snapshot["at_s"] - time.time()) < 60
    assert all("text" not in prefix for prefix in snapshot["forest"]["prefixes"])


@pytest.mark.parametrize(
    ("args", "headers", "status"),
    [
        ({"admin_api_key": "a"}, {}, 401),
        ({"admin_api_key": "a"}, {"authorization": "Bearer b"}, 401),
        ({"admin_api_key": "a"}, {"authorization": "Bearer a"}, 200),
        ({"admin_api_key": "a", "api_key": "k"}, {"authorization": "Bearer k"}, 401),
        ({"api_key": "k"}, {}, 401),
        ({"api_key": "k"}, {"authorization": "Bearer k"}, 200),
        ({"tiered_kv_view": "off"}, {}, 403),
        ({"tiered_kv": False}, {}, 403),
        ({}, {"origin": "https://elsewhere.example"}, 403),
        ({}, {"sec_fetch_site": "cross-site"}, 403),
    ],
)
def test_who_may(serve: Any, args: dict[str, Any], headers: dict[str, str], status: int) -> None:
    app, manager = serve(**args)
    response = get(app, **headers)
    assert response.status_code == status
    if status != 200:
        (sentence,) = response.json().values()
        assert sentence.endswith(".")
        assert manager.asked == 0


def test_parameters_are_refused(serve: Any) -> None:
    app, _ = serve()
    response = get(app, f"{PATH}?prefixes=1000000")
    assert response.status_code == 400
    assert "takes no parameters" in response.json()["error"]


def test_many_viewers_cost_no_more_than_one(serve: Any) -> None:
    app, manager = serve()
    manager.delay_s = 0.05

    async def all_at_once() -> list[httpx.Response]:
        first = await asyncio.gather(*(_get(app) for _ in range(10)))
        return [*first, *await asyncio.gather(*(_get(app) for _ in range(10)))]

    responses = asyncio.run(all_at_once())
    assert {response.status_code for response in responses} == {200}
    assert manager.asked == len(PARTS)


def test_a_busy_scheduler(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever, and the late answer goes to nobody else."""
    monkeypatch.setattr(endpoint, "PATIENCE_S", 0.05)
    app, manager = serve()
    manager.delay_s = 0.15

    async def ask() -> tuple[httpx.Response, httpx.Response]:
        late = await _get(app)
        await asyncio.sleep(0.35)
        return late, await _get(app)

    late, fine = asyncio.run(ask())
    assert late.status_code == 503
    assert "has not answered" in late.json()["error"]
    assert fine.status_code == 200
    assert manager.asked == len(PARTS)


def test_a_scheduler_that_keeps_nothing(serve: Any) -> None:
    app, manager = serve()
    manager._take = lambda part: None
    response = get(app)
    assert response.status_code == 503
    assert "keeps nothing" in response.json()["error"]


def test_before_the_server_is_up(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints import http_server

    app, _ = serve()
    monkeypatch.setattr(http_server, "get_global_state", lambda: None)
    assert get(app).status_code == 503


def test_text_only_if_the_operator_said_so(serve: Any, scheduler: Scheduler) -> None:
    app, _ = serve(admin_api_key="a", tiered_kv_view_text_tokens=3)
    scheduler.scheduler.server_args.tiered_kv_view_text_tokens = 3
    try:
        prefixes = get(app, authorization="Bearer a").json()["forest"]["prefixes"]
    finally:
        scheduler.scheduler.server_args.tiered_kv_view_text_tokens = 0
    assert all(len(prefix["text"].split()) == 3 for prefix in prefixes)
