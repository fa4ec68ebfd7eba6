"""Requests to SGLang's own /generate, and what came of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import requests

from harness.server import Server

REQUEST_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Answer:
    """One completed generation. Token counts of the prompt, by the tier its KV came from."""

    text: str
    output_ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    device: int
    host: int
    disk: int
    store: int
    finish_reason: str
    meta_info: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, body: dict[str, Any]) -> Answer:
        meta = body["meta_info"]
        details = meta.get("cached_tokens_details") or {}
        is_aborted = meta["finish_reason"]["type"] == "abort" and "prompt_tokens" not in meta
        return cls(
            text=body["text"],
            output_ids=tuple(body["output_ids"]),
            # SGLang says neither of a request that is aborted while it waits.
            prompt_tokens=meta["prompt_tokens"] if not is_aborted else 0,
            cached_tokens=meta["cached_tokens"] if not is_aborted else 0,
            device=details.get("device", 0),
            host=details.get("host", 0),
            disk=details.get("storage", 0) - details.get("store", 0),
            store=details.get("store", 0),
            finish_reason=meta["finish_reason"]["type"],
            meta_info=meta,
        )


def request_body(prompt: str | Sequence[int], max_new_tokens: int, **extra: Any) -> dict[str, Any]:
    """Greedy, and exactly `max_new_tokens` long; `extra` are further top-level fields."""
    sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
    sampling.update(extra.pop("sampling_params", {}))
    what = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
    return {**what, "sampling_params": sampling, **extra}


def post_generate(server: Server, body: dict[str, Any]) -> requests.Response:
    return server.post("/generate", body, timeout_s=REQUEST_TIMEOUT_S)


def generate(
    server: Server, prompt: str | Sequence[int], max_new_tokens: int = 8, **extra: Any
) -> Answer:
    response = post_generate(server, request_body(prompt, max_new_tokens, **extra))
    assert response.status_code == 200, f"{response.status_code} {response.text}{server.tail()}"
    return Answer.of(response.json())


def generate_all(
    server: Server,
    prompts: Iterable[str | Sequence[int]],
    max_new_tokens: int = 8,
    concurrency: int = 8,
    **extra: Any,
) -> list[Answer]:
    """The answers, in the order of the prompts."""
    return in_parallel(
        lambda prompt: generate(server, prompt, max_new_tokens, **extra), prompts, concurrency
    )


def in_parallel(call: Callable[[Any], Any], items: Iterable[Any], concurrency: int) -> list[Any]:
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(call, items))
