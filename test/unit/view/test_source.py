"""What is said of servers that answer something else, or nothing."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from support_view.recorded import NOWHERE
from tiered_kv.core.errors import ConfigError
from tiered_kv.view.source import NoSnapshotError, Server

Handler = Callable[[httpx.Request], httpx.Response]


def once(handler: Handler, key: str | None = None) -> dict[str, Any]:
    server = Server("http://server:30000/", key, transport=httpx.MockTransport(handler))
    return asyncio.run(server.once())


def test_the_key_goes_along() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://server:30000/tiered_kv/snapshot"
        assert request.headers["authorization"] == "Bearer secret"
        assert "origin" not in request.headers
        return httpx.Response(200, json=NOWHERE)

    assert once(handler, "secret") == NOWHERE


@pytest.mark.parametrize(
    ("response", "sentence"),
    [
        (httpx.Response(401, json={"error": "Unauthorized"}), "wants its administrator's key"),
        (httpx.Response(404, json={"detail": "Not Found"}), "start it with --tiered-kv"),
        (httpx.Response(403, json={"error": "It is off; switch it on."}), "^It is off; switch"),
        (httpx.Response(503, json={"error": "It is busy; ask again."}), "^It is busy; ask"),
        (httpx.Response(500, text="oops"), "answers with HTTP 500"),
        (httpx.Response(200, text="<html>"), "is no SGLang server with --tiered-kv"),
        (httpx.Response(200, json=[1, 2]), "is no SGLang server with --tiered-kv"),
        (httpx.Response(200, json={**NOWHERE, "version": 9}), "version 9, and this page knows 1"),
    ],
)
def test_other_answers(response: httpx.Response, sentence: str) -> None:
    with pytest.raises(NoSnapshotError, match=sentence) as error:
        once(lambda request: response)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (httpx.ConnectError("refused"), "No server answers at http://server:30000"),
        (httpx.ReadTimeout("slow"), "has not answered within"),
        (httpx.RemoteProtocolError("cut"), "No server answers"),
    ],
)
def test_no_answer(error: Exception, sentence: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(NoSnapshotError, match=sentence):
        once(handler)


@pytest.mark.parametrize("url", ["", "127.0.0.1:30000", "ftp://server", "http://"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ConfigError, match="--url must be like"):
        Server(url)


def test_it_goes_on_asking() -> None:
    answers = [httpx.Response(500), httpx.Response(200, json=copy.deepcopy(NOWHERE))]

    async def two() -> list[Any]:
        transport = httpx.MockTransport(lambda request: answers.pop(0))
        found: list[Any] = []
        async for seen in Server("http://s", every_s=0.0, transport=transport).snapshots():
            found.append(seen)
            if len(found) == 2:
                break
        return found

    lost, found = asyncio.run(two())
    assert isinstance(lost, NoSnapshotError)
    assert found == NOWHERE
