"""What is counted of requests while memory runs out under them, and they come back.

Guarantee: no request has more cached tokens than its prompt has, the tiers add up to them, there is
one log-probability for each token, a stream only grows, and the counters moved by what the answers
say together.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from harness.client import Answer, in_parallel, post_generate, request_body
from harness.metrics import scrape
from harness.prompts import PromptMaker
from harness.server import Server
from support.selection import selection_args
from support.workload import retracting
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(900)]

N_NEW = 100
CLASSES = ("interactive", "standard", "batch")


def ask(server: Server, prompt: tuple[int, ...], kind: int) -> Answer:
    """One request of three kinds: a stream, one with log-probabilities, a plain one."""
    body = request_body(prompt, N_NEW, slo={"class": CLASSES[kind]})
    if kind == 0:
        return _streamed(server, body)
    with_logprobs = kind == 1
    answer = Answer.of(post_generate(server, {**body, "return_logprob": with_logprobs}).json())
    if with_logprobs:
        assert len(answer.meta_info["output_token_logprobs"]) == N_NEW
    return answer


def _streamed(server: Server, body: dict[str, Any]) -> Answer:
    with post_generate(server, {**body, "stream": True}) as response:
        lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines]
    for shorter, longer in itertools.pairwise(piece["output_ids"] for piece in pieces):
        assert longer[: len(shorter)] == shorter
    return Answer.of(pieces[-1])


def test_accounts_while_memory_runs_out(
    make_server: Callable[..., Server], prompts: PromptMaker
) -> None:
    """SGLang is told to retract all the same, whatever there is room for."""
    shared = prompts.tokens("shared", 64)
    asked = [
        (*(shared if i % 2 else ()), *prompts.tokens(f"own {i}", 40 if i % 2 else 90))
        for i in range(10)
    ]
    env = retracting(10)
    args = selection_args("all", 1024, "--page-size", 16, "--enable-metrics")
    with make_server("accounts", *args, env=env) as server:
        before = scrape(server)
        answers = in_parallel(lambda i: ask(server, asked[i], i % 3), range(10), 10)
        after = scrape(server)

    assert sum(answer.meta_info["num_retractions"] for answer in answers) > 3
    for answer in answers:
        assert (answer.finish_reason, len(answer.output_ids)) == ("length", N_NEW)
        assert answer.device + answer.host + answer.disk == answer.cached_tokens
        assert answer.cached_tokens < answer.prompt_tokens
    for metric, said in (
        (names.PROMPT_TOKENS, sum(answer.prompt_tokens for answer in answers)),
        (names.HIT_TOKENS, sum(answer.cached_tokens for answer in answers)),
    ):
        assert after.of(metric) - before.of(metric) == said, metric.name
