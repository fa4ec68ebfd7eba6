"""`python -m tiered_kv.cache`: what is sent, what is shown, what is said of other servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tiered_kv import cache

ANSWER = {
    "action": "keep",
    "replicas": 2,
    "prompts": 1,
    "tokens": 1010,
    "tiers": {"device": 0, "host": 960, "disk": 1008},
    "nowhere": 0,
    "in_use": 16,
    "below": 1200,
    "kept": {"host": {"tokens": 960, "ends_in_s": 59.7}},
    "next_use_s": 12.0,
    "next_use_probability": 0.9,
    "done": {"host": 960, "disk": 0},
    "beyond_bounds": 48,
    "ends_in_s": 60,
}


def body_of(*arguments: str) -> dict[str, Any]:
    return cache._body(cache.parser().parse_args(arguments))


def test_what_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_text("a text")
    assert body_of("drop", "--file", str(path)) == {"action": "drop", "text": "a text"}
    path.write_text('[{"role": "user"}]')
    arguments = ("prefetch", "--messages", str(path), "--tier", "device", "--lora", "l")
    assert body_of(*arguments) == {
        "action": "prefetch",
        "messages": [{"role": "user"}],
        "tier": "device",
        "lora_path": "l",
    }
    path.write_text('{"model": "m", "messages": [1], "tools": [2]}')
    body = body_of("inspect", "--messages", str(path))
    assert body == {"action": "inspect", "messages": [1], "tools": [2]}
    path.write_text("[1, 2]")
    body = body_of("keep", "--token-ids", str(path), "--seconds", "0", "--tenant", "blue")
    assert body == {"action": "keep", "token_ids": [1, 2], "seconds": 0.0, "tenant": "blue"}
    body = body_of("demote", "--session", "s", "--cache-salt", "x", "--extra-key", "y")
    assert body == {"action": "demote", "session_id": "s", "cache_salt": "x", "extra_key": "y"}


def test_the_key_goes_along() -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://server:1/tiered_kv/cache"
        assert request.headers["authorization"] == "Bearer secret"
        assert "origin" not in request.headers
        return httpx.Response(200, json=ANSWER)

    answer = cache.send("http://server:1/", {}, "secret", httpx.MockTransport(handler))
    assert answer == ANSWER


def test_what_is_shown() -> None:
    assert cache.table(ANSWER).splitlines() == [
        "keep: 1,010 tokens of one prompt, on 2 replicas",
        "",
        "tier        tokens now          kept",
        "device               0",
        "host               960           960  960 kept for 60 s",
        "disk             1,008             0",
        "nowhere              0",
        "16 tokens in use by requests or transfers",
        "48 tokens not kept: more than the server's bounds allow",
        "1,200 tokens go on from there",
        "expected to be needed in 12 s (90% sure)",
    ]


@pytest.mark.parametrize(
    ("response", "sentence"),
    [
        (httpx.Response(401, json={"error": "Unauthorized"}), "wants its administrator's key"),
        (httpx.Response(404, json={"detail": "Not Found"}), "start it with --tiered-kv"),
        (httpx.Response(405, json={"detail": "Not allowed"}), "start it with --tiered-kv"),
        (httpx.Response(404, json={"error": "No such session."}), "^No such session"),
        (httpx.Response(400, json={"error": "It is wrong."}), "^It is wrong"),
        (httpx.Response(500, text="oops"), "answers with HTTP 500"),
        (httpx.Response(200, text="<html>"), "is no SGLang server with --tiered-kv"),
        (httpx.Response(200, json=[1]), "is no SGLang server with --tiered-kv"),
    ],
)
def test_other_answers(response: httpx.Response, sentence: str) -> None:
    with pytest.raises(cache.NotDoneError, match=sentence) as error:
        cache.send("http://server:1", {}, None, httpx.MockTransport(lambda _: response))
    assert str(error.value).endswith(".")


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(cache.NotDoneError, match="No server answers at http://server:1"):
        cache.send("http://server:1", {}, None, httpx.MockTransport(handler))
    assert cache.main(["inspect", "--text", "a", "--url", "server:1"]) == 2
    assert "--url must be like http://" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--file", "--messages", "--token-ids"])
def test_files_that_cannot_be_read(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it"
    assert cache.main(["inspect", option, str(path)]) == 2
    assert f"{option} {path} cannot be read" in capsys.readouterr().err
    if option != "--file":
        path.write_text("no json")
        assert cache.main(["inspect", option, str(path)]) == 2
        assert "is no JSON" in capsys.readouterr().err


def test_the_help_teaches() -> None:
    text = cache.parser().format_help()
    for word in ("inspect", "prefetch", "keep", "demote", "drop", "examples:", cache.KEY_VARIABLE):
        assert word in text
