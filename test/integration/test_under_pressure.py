"""Outputs under pressure: every completed one is what plain SGLang answers, token by token.

Pools much too small, prefill in small chunks, sixteen clients, some of which go away.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.client import generate
from harness.demo_model import host_size
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import FLOAT32, Server
from support.injection import injected
from support.oracle import Oracle
from support.workload import SHORT_OF_MEMORY, differences, mixed_requests, serve
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1800)]

N_REQUESTS = 300
CONCURRENCY = 16
DEVICE_TOKENS = 640
#: Little, so that more requests are admitted than fit and some must be retracted.
CONSERVATIVENESS = 0.05


def tight(disk: Path) -> list[object]:
    return [
        *FLOAT32, "--page-size", 16, "--chunked-prefill-size", 64,
        "--max-total-tokens", DEVICE_TOKENS, "--schedule-conservativeness", CONSERVATIVENESS,
        "--tiered-kv", "--tiered-kv-host-size", host_size(1024),
        "--tiered-kv-disk-dir", disk, "--tiered-kv-disk-size", "500MB",
        "--tiered-kv-debug-integrity", "--enable-metrics",
    ]  # fmt: skip


def test_300_requests_on_pools_that_are_much_too_small(
    make_server: Callable[..., Server], oracle: Oracle, prompts: PromptMaker, tmp_path: Path
) -> None:
    load = mixed_requests(prompts, N_REQUESTS, seed=1)
    truths = oracle.all_output_ids([(r.prompt, r.max_new_tokens) for r in load], CONCURRENCY)

    with make_server("under_pressure", *tight(tmp_path), env=SHORT_OF_MEMORY) as server:
        answers = serve(server, load, CONCURRENCY)
        wait_for_disk(server)
        hits = {t: scrape(server).of(names.HIT_TOKENS, tier=t) for t in ("device", "host", "disk")}
        # Idle again: what the load has left behind is consistent, and still right.
        again = [generate(server, r.prompt, r.max_new_tokens) for r in load[:5]]

    wrong = differences(answers, truths) + differences(again, truths[:5])
    assert not wrong, "\n".join(wrong)
    completed = [answer for answer in answers if answer is not None]
    assert len(completed) > 0.7 * N_REQUESTS
    assert sum(answer.meta_info["num_retractions"] for answer in completed) > 0
    assert all(tokens > 0 for tokens in hits.values()), hits


def test_wrong_bytes_from_host_would_be_noticed(
    make_server: Callable[..., Server], oracle: Oracle, prompts: PromptMaker, tmp_path: Path
) -> None:
    load = [r for r in mixed_requests(prompts, 60, seed=2) if r.give_up is None]
    truths = oracle.all_output_ids([(r.prompt, r.max_new_tokens) for r in load], CONCURRENCY)

    env = injected("corrupt_host")
    with make_server("corrupt_host", *tight(tmp_path), env=env) as server:
        answers = serve(server, load, CONCURRENCY)
        assert "corrupt_host: host -> device copies deliver wrong bytes" in server.log_text()
        hits = scrape(server).of(names.HIT_TOKENS, tier="host")

    assert hits > 0
    assert differences(answers, truths)
