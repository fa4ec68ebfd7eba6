"""Programs in progress keep their place on a real server: another one waits for room.

Host and device hold 2,048 tokens each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from harness.client import Answer, generate
from harness.demo_model import host_size
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.oracle import Oracle

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]

CONTEXT = 800


def test_a_program_waits_for_those_in_progress(
    make_server: Callable[..., Server], oracle: Oracle, prompts: PromptMaker
) -> None:
    args = ["--page-size", 16, "--max-total-tokens", 2048, "--chunked-prefill-size", 256]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(2048)]
    args += ["--tiered-kv-default-slo-class", "none", "--tiered-kv-debug-integrity"]
    with make_server("working_sets", *FLOAT32, *args) as server:

        def call(session: str, prompt: tuple[int, ...], n: int = 8) -> tuple[Answer, float]:
            said = {"hints": {"session_id": session}, "slo": {"report": True}}
            answer = generate(server, prompt, n, **said)
            return answer, time.monotonic()

        # Programs here come back.
        for _ in range(30):
            call("teacher", prompts.tokens("teacher", 16), 1)
        first, second, other = (prompts.tokens(name, CONTEXT) for name in ("a", "b", "c"))
        for session, prompt in (("a", first), ("b", second)):
            call(session, prompt)
        with ThreadPoolExecutor(3) as pool:
            long = pool.submit(call, "a", first, 256)
            time.sleep(1.0)
            new = pool.submit(call, "c", other)
            time.sleep(0.5)
            again = pool.submit(call, "b", second)
            answers = [one.result() for one in (long, new, again)]
        (_, a_s), (c, c_s), (b, b_s) = answers
        assert b_s < a_s < c_s, "what is in progress goes on, and what is new waits"
        assert b.cached_tokens >= CONTEXT - 16, "its context was kept"
        assert c.meta_info["tiered_kv"]["wait_ms"] > b.meta_info["tiered_kv"]["wait_ms"]
        assert [answer.output_ids for answer, _ in answers] == [
            oracle.output_ids(first, 256), oracle.output_ids(other), oracle.output_ids(second)
        ]  # fmt: skip
