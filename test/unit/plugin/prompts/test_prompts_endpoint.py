"""Prompts in pieces over HTTP: what the routes of a server are asked, and what callers are told.

The routes that generate are stand-ins that note what reaches them; test/integration/test_pieces.py
has the real ones.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("sglang")

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from tiered_kv.plugin.prompts import endpoint
from tiered_kv.plugin.prompts.endpoint import PATH
from tiered_kv.plugin.requests.adapter import AHEAD_KEY

PAGE_TOKENS = 16
LONG = "word " * 40
"""Longer than a page."""


class Manager:
    """What of SGLang's TokenizerManager is used."""

    def __init__(self, **args: Any) -> None:
        replicas = {"dp_size": 1, "attn_dp_size": 1, "pp_size": 1}
        args = {"tiered_kv": True, "tokenizer_worker_num": 1, **replicas, **args}
        args.setdefault("disaggregation_mode", "null")
        self.server_args = SimpleNamespace(page_size=PAGE_TOKENS, **args)
        self.aborted: list[str] = []

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)


class Server:
    """The HTTP server: its prompts, and routes that note what comes."""

    def __init__(self, **args: Any) -> None:
        self.manager = Manager(**args)
        self.app = FastAPI()
        self.ahead: list[dict[str, Any]] = []
        self.asked: list[tuple[str, dict[str, Any], str | None]] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.status = 200
        for path in ("/generate", "/v1/chat/completions", "/v1/completions"):
            self.app.add_api_route(path, self.answer, methods=["POST"], response_model=None)
        endpoint.add_routes(self.app)
        endpoint.add_routes(self.app)

    async def answer(self, request: Request) -> Any:
        body = await request.json()
        if request.scope.get(AHEAD_KEY):
            self.ahead.append({**body, "headers": dict(request.headers)})
            await self.may_answer.wait()
            said = {"meta_info": {"prompt_tokens": 7}} if self.status == 200 else {"error": "no"}
            return JSONResponse(said, self.status)
        self.asked.append((request.url.path, body, request.headers.get("authorization")))
        if body.get("stream"):
            return StreamingResponse(pieces(), media_type="text/event-stream")
        return {"text": "done"}

    def client(self, **headers: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app=self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers)


async def pieces() -> AsyncIterator[str]:
    for i in range(3):
        yield f"data: {i}\n\n"


def played(
    monkeypatch: pytest.MonkeyPatch,
    play: Callable[[Server, httpx.AsyncClient], Awaitable[None]],
    **args: Any,
) -> Server:
    """The server after `play`, in a loop of its own."""

    async def run() -> Server:
        from sglang.srt.entrypoints import http_server

        server = Server(**args)
        state = SimpleNamespace(tokenizer_manager=server.manager)
        monkeypatch.setattr(http_server, "get_global_state", lambda: state)
        async with server.client() as client:
            await play(server, client)
        return server

    return asyncio.run(run())


async def settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def opened(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 201, answer.text
    return f"{PATH}/{answer.json()['id']}"


def test_what_is_there_is_prefilled_and_the_whole_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        sampling = {"max_new_tokens": 30, "temperature": 0}
        url = await opened(client, {"text": LONG, "sampling_params": sampling, "stream": True})
        await settled()
        told = (await client.patch(url, json={"text": LONG})).json()
        await settled()
        assert told["characters"] == 2 * len(LONG)
        assert (await client.get(url)).json()["prefilled_tokens"] == 7
        answer = await client.post(f"{url}/finish", json={"stream": False})
        assert (answer.status_code, answer.json()) == (200, {"text": "done"})
        assert (await client.get(url)).status_code == 404

    server = played(monkeypatch, play)

    assert [one["text"] for one in server.ahead] == [LONG, LONG + LONG]
    for one in server.ahead:
        assert one["sampling_params"] == {"max_new_tokens": 1}
        assert "stream" not in one
    ((path, body, _),) = server.asked
    assert (path, body["text"], body["stream"]) == ("/generate", LONG + LONG, False)
    assert body["sampling_params"] == {"max_new_tokens": 30, "temperature": 0}
    assert server.manager.aborted == []


def test_a_stream_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        url = await opened(client, {"messages": [{"role": "user", "content": LONG}]})
        answer = await client.post(f"{url}/finish", json={"stream": True})
        assert answer.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"

    assert played(monkeypatch, play).asked[0][0] == "/v1/chat/completions"


def test_of_what_comes_meanwhile_the_newest_is_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        server.may_answer.clear()
        url = await opened(client, {"text": LONG})
        await settled()
        for _ in range(3):
            await client.patch(url, json={"text": LONG})
        await settled()
        assert len(server.ahead) == 1
        server.may_answer.set()
        await settled()

    server = played(monkeypatch, play)
    assert [len(one["text"]) for one in server.ahead] == [len(LONG), 4 * len(LONG)]


def test_what_adds_no_page_is_left_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        url = await opened(client, {"text": LONG})
        await settled()
        for _ in range(4):
            await client.patch(url, json={"text": "of a few "})
            await settled()

    server = played(monkeypatch, play)
    assert len(server.ahead) == 1


def test_what_was_replaced_is_not_prefilled_further(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        server.may_answer.clear()
        url = await opened(client, {"text": LONG})
        await settled()
        await client.patch(url, json={"text": LONG.upper(), "from": 5})
        await settled()
        assert server.manager.aborted == [server.ahead[0]["rid"]]
        server.may_answer.set()

    server = played(monkeypatch, play)
    assert [one["text"] for one in server.ahead] == [LONG, LONG[:5] + LONG.upper()]


def test_prefill_of_a_prompt_that_is_deleted_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        server.may_answer.clear()
        url = await opened(client, {"text": LONG})
        await settled()
        assert (await client.delete(url)).status_code == 204
        server.may_answer.set()
        await settled()

    server = played(monkeypatch, play)
    assert server.manager.aborted == [server.ahead[0]["rid"]]


def test_nothing_is_prefilled_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way then computes what the whole begins with."""

    async def play(server: Server, client: httpx.AsyncClient) -> None:
        server.may_answer.clear()
        url = await opened(client, {"text": LONG})
        await settled()
        await client.patch(url, json={"text": LONG})
        await client.post(f"{url}/finish", json={"text": LONG})
        server.may_answer.set()
        await settled()

    server = played(monkeypatch, play)
    assert server.manager.aborted == []
    assert [one["text"] for one in server.ahead] == [LONG]
    assert [body["text"] for _, body, _ in server.asked] == [LONG * 3]


def test_of_token_ids_whole_pages_are_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        url = await opened(client, {"input_ids": [7] * 40})
        await settled()
        await client.patch(url, json={"input_ids": [8] * 30})
        await settled()
        await client.post(f"{url}/finish")

    server = played(monkeypatch, play)
    assert [len(one["input_ids"]) for one in server.ahead] == [32, 64]
    assert len(server.asked[0][1]["input_ids"]) == 70


def test_what_the_route_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        server.status = 400
        url = await opened(client, {"text": LONG})
        await settled()
        assert (await client.get(url)).json()["refused"] == "no"

    played(monkeypatch, play)


def test_only_who_shows_the_key_reaches_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        async with server.client(authorization="Bearer a") as mine:
            url = await opened(mine, {"text": LONG})
            await settled()
            assert (await client.get(url)).status_code == 404
            assert (await client.post(f"{url}/finish")).status_code == 404
            assert (await mine.post(f"{url}/finish")).status_code == 200

    server = played(monkeypatch, play)
    assert server.ahead[0]["headers"]["authorization"] == "Bearer a"
    assert server.asked[0][2] == "Bearer a"


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b'"a"', b"[]", b"\xff"])
def test_a_body_that_is_no_object_is_400(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        url = await opened(client, {"text": LONG})
        for ask in (client.post(PATH, content=content), client.patch(url, content=content)):
            answer = await ask
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].endswith(".")
        answer = await client.post(f"{url}/finish", content=content)
        assert answer.status_code == 400

    played(monkeypatch, play)


@pytest.mark.parametrize(
    ("args", "status", "word"),
    [
        ({"tiered_kv": False}, 404, "--tiered-kv"),
        ({"tokenizer_worker_num": 2}, 501, "worker"),
        ({"disaggregation_mode": "prefill"}, 501, "--disaggregation-mode"),
        ({"pp_size": 2}, 501, "--pp-size"),
    ],
)
def test_a_server_that_cannot_says_so(
    args: dict[str, Any], status: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        answer = await client.post(PATH, json={"text": LONG})
        assert answer.status_code == status
        assert word in json.dumps(answer.json())

    played(monkeypatch, play, **args)


def test_all_of_a_prompt_goes_to_one_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(server: Server, client: httpx.AsyncClient) -> None:
        for _ in range(4):
            url = await opened(client, {"text": LONG})
            await settled()
            await client.post(f"{url}/finish")

    server = played(monkeypatch, play, dp_size=2)
    ahead = [one["routed_dp_rank"] for one in server.ahead]
    assert ahead == [body["routed_dp_rank"] for _, body, _ in server.asked]
    assert set(ahead) == {0, 1}
    assert [one["headers"]["x-data-parallel-rank"] for one in server.ahead] == [*map(str, ahead)]
