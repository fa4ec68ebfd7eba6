"""Orders from HTTP to the schedulers of two replicas and back: who may, and what becomes of them.

The tokenizer is a double; SGLang's own communicator carries the orders to desks over rigs.
"""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from fastapi import FastAPI
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers.communicator import FanOutCommunicator
from sglang.srt.managers.io_struct import GetInternalStateReq

from support_tiers.tier_rig import Rig, new_disk, tokens_of
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.control import desk, endpoint, messages, orders
from tiered_kv.plugin.control.endpoint import BODY_MAX, PATH
from tiered_kv.plugin.requests.salts import key_of, root_key
from tiered_kv.scheduler.session_prompts import SessionPrompt, SessionPrompts

PROMPT = tokens_of(1, 2, 3, 4, tail=1)
ARGS = {
    "tiered_kv": True,
    "tiered_kv_view": "on",
    "tiered_kv_keep_seconds": 60.0,
    "tiered_kv_keep_share": 50.0,
    "api_key": None,
    "admin_api_key": None,
    "served_model_name": "demo",
}


class Scheduler:
    """What of SGLang's is used, over a rig."""

    def __init__(self, args: Any) -> None:
        self.rig = Rig(disk=new_disk())
        self.server_args = args
        self.tiered_kv_order = SimpleNamespace(
            sessions=SessionPrompts(), foretold=SimpleNamespace(told={})
        )
        parts = SimpleNamespace(metrics=MetricsRecorder(), disk_store=None, has_disk=True)
        self.tree_cache = SimpleNamespace(
            supports_mamba=lambda: False,
            hierarchy=self.rig.hierarchy,
            parts=parts,
            weights=SimpleNamespace(is_named=True),
            control=None,
        )


class Manager:
    """What of SGLang's TokenizerManager is used, in front of two replicas."""

    def __init__(self, **args: Any) -> None:
        self.server_args = SimpleNamespace(**{**ARGS, **args})
        self.tokenizer: Any = object()
        self.lora_registry = LoRARegistry()
        self.context_len = 1000
        self.schedulers = [Scheduler(self.server_args) for _ in range(2)]
        self.asked = 0
        self.get_internal_state_communicator: Any = FanOutCommunicator(self._send, 2)

    def auto_create_handle_loop(self) -> None:
        pass

    async def _tokenize_texts(self, text: str) -> tuple[list[int], None]:
        return list(json.loads(text)), None

    def _send(self, request: GetInternalStateReq) -> None:
        self.asked += 1
        asyncio.get_running_loop().call_soon(self._answer, request)

    def _answer(self, request: GetInternalStateReq) -> None:
        for scheduler in self.schedulers:
            scheduler.rig.hierarchy.poll()
            answer = desk.answer(lambda *_: None, scheduler, request)
            self.get_internal_state_communicator.handle_recv(answer)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FastAPI, Manager]]]:
    from sglang.srt.entrypoints import http_server

    made: list[Manager] = []

    def make(**args: Any) -> tuple[FastAPI, Manager]:
        manager = Manager(**args)
        made.append(manager)
        monkeypatch.setattr(
            http_server, "get_global_state", lambda: SimpleNamespace(tokenizer_manager=manager)
        )
        monkeypatch.setattr(endpoint, "_orders", {})
        app = FastAPI()
        endpoint.add_route(app)
        endpoint.add_route(app)
        return app, manager

    yield make
    for manager in made:
        for scheduler in manager.schedulers:
            scheduler.rig.close()


def post(app: FastAPI, body: Any, path: str = PATH, **headers: str) -> httpx.Response:
    return asyncio.run(_post(app, body, path, **headers))


async def _post(app: FastAPI, body: Any, path: str = PATH, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        named = {k.replace("_", "-"): v for k, v in headers.items()}
        return await client.post(path, content=content, headers=named)


def about(prompt: array[int], action: str = "inspect", **fields: Any) -> dict[str, Any]:
    return {"action": action, "token_ids": prompt.tolist(), **fields}


def test_all_replicas_carry_it_out(serve: Any) -> None:
    app, manager = serve()
    for scheduler in manager.schedulers:
        scheduler.rig.serve(PROMPT)
        scheduler.rig.drain()
    response = post(app, about(PROMPT))
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    found = response.json()
    assert (found["action"], found["replicas"], found["tokens"]) == ("inspect", 2, 17)
    assert found["tiers"] == {"device": 32, "host": 32, "disk": 32}
    done = post(app, {"action": "drop", "text": json.dumps(PROMPT.tolist())}).json()
    assert done["done"] == {"device": 32, "host": 32, "disk": 32}
    assert done["nowhere"] == 32
    kept = post(app, about(PROMPT, "keep", seconds=60)).json()
    assert kept["done"] == {"host": 0, "disk": 0}


def test_the_right_tree_is_meant(serve: Any) -> None:
    app, manager = serve()
    key = root_key(key_of("mine", None), None)
    manager.schedulers[0].rig.serve(PROMPT, key)
    assert post(app, about(PROMPT)).json()["tiers"]["device"] == 0
    assert post(app, about(PROMPT, cache_salt="mine")).json()["tiers"]["device"] == 16
    assert post(app, about(PROMPT, extra_key="mine")).json()["tiers"]["device"] == 0


def test_a_session_is_what_its_replica_remembers(serve: Any) -> None:
    app, manager = serve()
    first = manager.schedulers[0]
    first.rig.serve(PROMPT)
    first.tiered_kv_order.sessions.ended("s", "blue", SessionPrompt(None, PROMPT))
    found = post(app, {"action": "inspect", "session_id": "s"}).json()
    assert (found["prompts"], found["tiers"]["device"]) == (1, 16)
    response = post(app, {"action": "inspect", "session_id": "s", "tenant": "red"})
    assert response.status_code == 404
    assert response.json()["error"].startswith("No session of that name is remembered")
    assert post(app, {"action": "drop", "program_id": "s"}).json()["done"]["device"] == 16
    assert not len(first.tiered_kv_order.sessions)
    first.tiered_kv_order = None
    del first.tiered_kv_desk
    response = post(app, {"action": "drop", "session_id": "s"})
    assert (response.status_code, response.json()["error"]) == (409, desk.NO_SESSIONS)


@pytest.mark.parametrize(
    ("args", "headers", "status"),
    [
        ({"admin_api_key": "a"}, {}, 401),
        ({"admin_api_key": "a"}, {"authorization": "Bearer b"}, 401),
        ({"admin_api_key": "a"}, {"authorization": "Bearer a"}, 200),
        ({"admin_api_key": "a", "api_key": "k"}, {"authorization": "Bearer k"}, 401),
        ({"api_key": "k"}, {}, 401),
        ({"tiered_kv_view": "off"}, {}, 403),
        ({"tiered_kv": False}, {}, 403),
        ({}, {"origin": "https://elsewhere.example"}, 403),
    ],
)
def test_who_may(serve: Any, args: dict[str, Any], headers: dict[str, str], status: int) -> None:
    app, manager = serve(**args)
    response = post(app, about(PROMPT), **headers)
    assert response.status_code == status
    if status != 200:
        assert response.json()["error"].endswith(".")
        assert "napshot" not in response.json()["error"]
        assert manager.asked == 0


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "must be JSON"),
        (b"{", "must be JSON"),
        (b"\xff\xfe", "must be JSON"),
        (b"[" * 200_000, "must be JSON"),
        (b'{"action": "drop", "token_ids": [1' + b"0" * 5000 + b"]}", "must be JSON"),
        (b"x" * (BODY_MAX + 1), "more than 16 MiB"),
        (b"7", "must be an object"),
        (b'{"action": "inspect", "text": "x"}', "cannot be made a prompt of"),
        (b'{"action": "inspect", "messages": [1]}', "cannot be made a prompt of"),
        (b'{"action": "inspect", "text": "[' + b"1," * 1000 + b'1]"}', "has 1001 tokens"),
        (b'{"action": "inspect", "text": "[]", "lora_path": "l"}', "names no adapter"),
    ],
)
def test_hostile_bodies(serve: Any, body: bytes, sentence: str) -> None:
    app, manager = serve()
    response = post(app, body)
    assert response.status_code == 400
    assert sentence in response.json()["error"]
    assert manager.asked == 0


def test_parameters_are_refused(serve: Any) -> None:
    app, _ = serve()
    response = post(app, about(PROMPT), f"{PATH}?action=drop")
    assert (response.status_code, response.json()["error"]) == (
        400,
        "/tiered_kv/cache takes no parameters; leave them out.",
    )


def test_too_many_at_once_are_told_so(serve: Any) -> None:
    app, _ = serve()

    async def all_at_once() -> list[int]:
        wanted = [_post(app, about(PROMPT)) for _ in range(orders.WAITING_MAX + 5)]
        return [response.status_code for response in await asyncio.gather(*wanted)]

    codes = asyncio.run(all_at_once())
    assert set(codes) == {200, 503}


def test_weights_without_a_name(serve: Any) -> None:
    app, manager = serve()
    manager.schedulers[1].tree_cache.weights.is_named = False
    assert post(app, about(PROMPT)).status_code == 409


def test_what_takes_too_long_is_left(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "ORDER_S", 0.05)
    app, manager = serve()
    rig = manager.schedulers[0].rig
    rig.copier.down.hold()
    rig.serve(PROMPT)
    done = post(app, about(PROMPT, "demote")).json()
    assert done["done"] == {"device": 0, "host": 0}
    assert done["unwritten"] == 16
    rig.copier.down.release()


def test_a_message_is_what_was_sent() -> None:
    tokens = array("q", [0, 1, 2**31 - 1])
    assert messages.read(messages.written({"a": "\n ü"}, tokens)) == ({"a": "\n ü"}, tokens)
    assert messages.read(messages.written({})) == ({}, array("q"))
    assert messages.read("tiered_kv_forest") is None
    assert messages.read(None) is None
