"""A load of requests with shared prefixes, mixed lengths and clients that give up."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import requests

from harness.client import Answer, generate, in_parallel, request_body
from harness.server import Server
from tiered_kv.plugin.upstream.installed import installed


def retracting(n_passes: int) -> dict[str, str]:
    """The environment of a server that retracts requests every `n_passes`, whatever has room."""
    return {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": str(n_passes)}


#: Of a server whose pool is too small for all. 0.5.23 sets the whole answer aside for who ignores
#: stops, and so would never run out: it is made to retract.
SHORT_OF_MEMORY = {} if installed() == "0.5.17" else retracting(25)


class Tokens(Protocol):
    """Prompts as token ids (`harness.prompts.PromptMaker`)."""

    def tokens(self, seed: object, n: int) -> tuple[int, ...]: ...


class OfFewWords:
    """The same prompts in token ids below `vocabulary`, for models that know no others."""

    def __init__(self, prompts: Tokens, vocabulary: int) -> None:
        self._prompts = prompts
        self._vocabulary = vocabulary

    def tokens(self, seed: object, n: int) -> tuple[int, ...]:
        """`n` token ids; none is one of the first three, which begin and end texts."""
        ids = self._prompts.tokens(seed, n)
        return tuple(3 + token % (self._vocabulary - 3) for token in ids)


@dataclass(frozen=True)
class Request:
    """give_up: None, or how the client goes away ("disconnect", "abort") after `patience_s`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    give_up: str | None = None
    patience_s: float = 0.0
    extra_key: str | None = None

    def alone(self, key: str) -> Request:
        """The same, under a key of its own and by a client that waits."""
        return replace(self, give_up=None, extra_key=key)


def mixed_requests(prompts: Tokens, n: int, seed: int) -> list[Request]:
    """`n` requests: a dozen families, each a tree of prefixes; one in six gives up."""
    rng = random.Random(seed)
    trunks = [prompts.tokens(f"family {seed} {i}", rng.randrange(48, 160)) for i in range(12)]
    load = []
    for i in range(n):
        trunk = rng.choice(trunks)
        shared = trunk[: rng.randrange(len(trunk) // 3, len(trunk) + 1)]
        tail = prompts.tokens(f"tail {seed} {i}", rng.randrange(4, 40))
        if rng.random() < 0.1:
            tail = ()  # exactly a prefix of others, and sometimes the same prompt again
        long_answer = rng.random() < 0.12
        n_new = rng.randrange(40, 64) if long_answer else rng.randrange(2, 16)
        give_up = rng.choice(["disconnect", "abort"]) if rng.random() < 1 / 6 else None
        load.append(Request((*shared, *tail), n_new, give_up, rng.uniform(0.02, 2.0)))
    return load


def serve(server: Server, load: Sequence[Request], concurrency: int) -> list[Answer | None]:
    """The answers, in order; None where the client gave up."""
    return in_parallel(lambda request: _serve_one(server, request), load, concurrency)


def _serve_one(server: Server, request: Request) -> Answer | None:
    if request.give_up is None:
        extra = {} if request.extra_key is None else {"extra_key": request.extra_key}
        return generate(server, request.prompt, request.max_new_tokens, **extra)
    rid = uuid.uuid4().hex
    body = request_body(request.prompt, request.max_new_tokens, rid=rid, stream=True)
    if request.give_up == "abort":
        timer = threading.Timer(request.patience_s, server.post, ("/abort_request", {"rid": rid}))
        timer.start()
        _read(server, body, until_s=120)
        timer.join()
    else:
        _read(server, body, until_s=request.patience_s)
    return None


def _read(server: Server, body: dict[str, Any], until_s: float) -> None:
    """Reads a stream to its end, or closes the connection when the time is up."""
    deadline = time.monotonic() + until_s
    # Whether it gets that far or not, nobody looks at what comes of it.
    with (
        contextlib.suppress(requests.RequestException),
        requests.post(f"{server.url}/generate", json=body, timeout=until_s, stream=True) as stream,
    ):
        for _ in stream.iter_content(chunk_size=None):
            if time.monotonic() > deadline:
                return


def differences(answers: Sequence[Answer | None], truths: Sequence[tuple[int, ...]]) -> list[str]:
    """A line for every completed answer that is not the truth."""
    return [
        f"request {i}: {answer.output_ids} instead of {truth} ({answer.meta_info})"
        for i, (answer, truth) in enumerate(zip(answers, truths, strict=True))
        if answer is not None and answer.output_ids != truth
    ]
