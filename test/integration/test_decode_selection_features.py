"""What requests may ask for beside plain decoding, while only some of them decode at a time.

Grammars, several answers to one prompt, streams and LoRA adapters; the oracle is plain SGLang in
float32, with the same adapters.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from harness.client import generate, in_parallel, post_generate, request_body
from harness.prompts import PromptMaker
from harness.server import FLOAT32, Server
from support.adapters import write_adapter
from support.injection import injected
from support.oracle import Oracle
from support.selection import TIGHT_TBT_MS, selection_args

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]

MakeServer = Callable[..., Server]
N_NEW = 12
TIGHT = {"class": "interactive", "tbt_ms": TIGHT_TBT_MS}
BATCH = {"class": "batch"}
WORDS = r"([a-z]{2,7} ){4,12}"
PAGES = ("--page-size", 16)


def slo_of(i: int) -> dict[str, Any]:
    return BATCH if i % 2 else TIGHT


def streamed(server: Server, prompt: tuple[int, ...], slo: dict[str, Any]) -> list[list[int]]:
    """What each piece of the stream says the answer is so far."""
    body = {**request_body(prompt, N_NEW), "slo": slo, "stream": True}
    with post_generate(server, body) as response:
        assert response.status_code == 200
        pieces = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(piece[len("data: ") :])["output_ids"] for piece in pieces]


def test_grammars_several_answers_and_streams_while_others_take_turns(
    taking_turns: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    asked = [prompts.tokens(f"feature {i}", 70 + 5 * i) for i in range(9)]
    grammar = {"regex": WORDS, "max_new_tokens": 24}

    def constrained(one: Server, i: int, **extra: Any) -> Any:
        return generate(one, asked[i], sampling_params=grammar, **extra).output_ids

    def several(one: Server, i: int, **extra: Any) -> Any:
        body = request_body(asked[i], N_NEW, sampling_params={"n": 3}, **extra)
        answers = post_generate(one, body).json()
        return [tuple(answer["output_ids"]) for answer in answers]

    def stream_of(one: Server, i: int, slo: dict[str, Any]) -> Any:
        return streamed(one, asked[i], slo)

    kinds = (constrained, several, stream_of)
    before = len(taking_turns.decode_sizes())
    ours = in_parallel(lambda i: kinds[i % 3](taking_turns, i, slo=slo_of(i)), range(9), 9)
    sizes = taking_turns.decode_sizes()[before:]
    # Three times one and three times three answers, and three streams: all at once it is 15.
    assert max(sizes) < 15, sizes
    for i, answer in enumerate(ours):
        plain = generate(oracle.server, asked[i], N_NEW).output_ids
        if kinds[i % 3] is constrained:
            assert answer == constrained(oracle.server, i)
            assert answer[:N_NEW] != plain, "the grammar changed nothing"
        elif kinds[i % 3] is several:
            assert answer == [plain] * 3
        else:
            assert tuple(answer[-1]) == plain
            for piece, longer in itertools.pairwise(answer):
                assert longer[: len(piece)] == piece
                assert len(longer) > len(piece)


def test_clients_that_hang_up_while_others_take_turns(
    taking_turns: Server, oracle: Oracle, prompts: PromptMaker
) -> None:
    """Streams, a batch and several choices, running, parked or queued: nobody decodes for them."""
    long = {"max_new_tokens": 3000}
    asked = [prompts.tokens(f"gone {i}", 60 + i) for i in range(6)]
    bodies = [request_body(prompt, 1, sampling_params=long, stream=True) for prompt in asked[:3]]
    bodies.append({**bodies[0], "input_ids": [list(prompt) for prompt in asked[3:5]]})
    bodies.append(request_body(asked[5], 1, sampling_params={**long, "n": 3}, stream=True))
    before = len(taking_turns.decode_sizes())
    streams = [
        requests.post(f"{taking_turns.url}/generate", json=body, stream=True, timeout=60)
        for body in bodies
    ]
    for stream in streams:
        assert next(stream.iter_lines()).startswith(b"data:")
    for stream in streams:
        stream.close()
    with contextlib.suppress(requests.Timeout):
        taking_turns.post("/generate", {**bodies[0], "stream": False}, timeout_s=0.5)

    prompt = prompts.tokens("stays", 60)
    assert generate(taking_turns, prompt, N_NEW).output_ids == oracle.output_ids(prompt, N_NEW)
    assert max(taking_turns.decode_sizes()[before:]) > 1, "they never ran beside each other"
    deadline = time.monotonic() + 60
    n_seen = -1
    while n_seen != (n_seen := len(taking_turns.decode_sizes())):
        assert time.monotonic() < deadline, "somebody decodes for those who are gone"
        time.sleep(3)


@pytest.mark.long
def test_adapters_while_others_take_turns(
    make_server: MakeServer, prompts: PromptMaker, demo_model: Path, tmp_path: Path
) -> None:
    """One prompt with three adapters and without: its KV must not be shared between them."""
    names = ["one", "two", "three"]
    paths = [
        f"{name}={write_adapter(tmp_path / name, demo_model, seed)}"
        for seed, name in enumerate(names)
    ]
    lora = ["--enable-lora", "--lora-backend", "torch_native", "--lora-paths", *paths]
    lora += ["--max-loras-per-batch", 4]
    unpinned = injected("unpinned")
    prompt = prompts.tokens("adapted", 150)
    asked = [(prompt[: 150 - 20 * (i // 4)], [None, *names][i % 4]) for i in range(8)]

    def ask(server: Server, adapter: str | None, tokens: tuple[int, ...], **extra: Any) -> Any:
        if adapter is not None:
            extra["lora_path"] = adapter
        return generate(server, tokens, N_NEW, **extra)

    plain_args = [*FLOAT32, *PAGES, *lora]
    with make_server("lora-plain", *plain_args, env=unpinned) as plain:
        expected = [ask(plain, adapter, tokens).output_ids for tokens, adapter in asked]
    assert len(set(expected)) == len(expected), "the adapters change nothing"
    with make_server(
        "lora-selection", *selection_args("round-robin", 8192, *PAGES, *lora), env=unpinned
    ) as server:
        for _ in range(2):
            before = len(server.decode_sizes())
            answers = in_parallel(
                lambda i: ask(server, asked[i][1], asked[i][0], slo=slo_of(i)), range(8), 8
            )
            assert [answer.output_ids for answer in answers] == expected
            assert max(server.decode_sizes()[before:]) < len(asked)
        assert all(answer.cached_tokens for answer in answers), "of the second time"
