"""Multi-head latent attention: its latents in all three tiers, with the answers of plain SGLang.

A small random model in the shape of DeepSeek-V2. A token takes 1,536 bytes, 128 floats on each of
three layers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.client import generate_all
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.models import tiny_mla_model

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]

POOL = ("--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128)
N_TOKENS = 300
N_REUSABLE = 288


def test_latents_come_back_from_every_tier(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_mla_model(demo_model, tmp_path / "model")
    asked = [prompts.tokens(f"latents {i}", N_TOKENS) for i in range(5)]
    only_platform = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
    with make_server("mla_plain", *FLOAT32, *POOL, model=model, env=only_platform) as plain:
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
        at_once = [answer.output_ids for answer in generate_all(plain, asked, concurrency=5)]
    assert len(set(truths)) == 5, "the model ignores its prompts"
    assert at_once == truths, "answers depend on the company"

    tiers = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", "4MB"]
    tiers += ["--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "300MB"]
    watch = ["--tiered-kv-debug-integrity", "--enable-metrics"]
    args = [*FLOAT32, *POOL, *tiers, *watch]
    with make_server("mla", *args, model=model) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_device = generate_all(server, asked[-1:], concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=1)
    with make_server("mla_again", *args, model=model) as server:
        after_restart = generate_all(server, asked, concurrency=4)

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.device for answer in from_device] == [N_REUSABLE]
    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    for answers in (from_disk, after_restart):
        assert [answer.disk + answer.device for answer in answers] == [N_REUSABLE] * 5
        # What is next in the queue may be on the device ahead of its turn, where there is room.
        assert all(answer.disk > N_REUSABLE // 2 for answer in answers)
    assert [a.output_ids for a in computed] == truths
    assert [a.output_ids for a in (*from_device, *from_host)] == [truths[-1], *truths[:2]]
    assert [a.output_ids for a in from_disk] == truths
    assert [a.output_ids for a in after_restart] == truths
