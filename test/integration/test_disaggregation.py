"""A prefill server with tiers, and plain servers that decode what it computes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from harness.client import generate_all
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.engines import engine_or_skip
from support.models import tiny_model_for_two_ranks
from support.pairs import Pair, both_up
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)]

POOL = ("--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128)
DECODE_POOL = ("--page-size", 16, "--max-total-tokens", 4096)
N_TOKENS = 300
N_REUSABLE = 288
ONLY_PLATFORM = {"SGLANG_PLUGINS": "tiered_kv_cpu"}


def tier_args(folder: Path, *more: object) -> list[object]:
    # 2,048 tokens on the host.
    args: list[object] = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", "8388608B"]
    args += ["--tiered-kv-disk-dir", folder, "--tiered-kv-disk-size", "400MB"]
    return [*args, "--tiered-kv-debug-integrity", "--enable-metrics", *more]


def test_a_prefill_server_keeps_what_it_computed(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_model_for_two_ranks(demo_model, tmp_path / "model")
    asked = [prompts.tokens(f"handed over {i}", N_TOKENS) for i in range(5)]
    with make_server("pd_plain", *FLOAT32, *POOL, model=model, env=ONLY_PLATFORM) as plain:
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
    assert len(set(truths)) == 5, "the model ignores its prompts"

    pair = engine_or_skip(lambda: Pair(make_server, "pd", *FLOAT32, model=model))
    prefill = pair.prefill(*POOL, *tier_args(tmp_path / "disk"))
    decode = pair.decode(*DECODE_POOL, **ONLY_PLATFORM)
    with ExitStack() as stack:
        both_up(prefill, decode)
        for server in (prefill, decode):
            stack.push(server.__exit__)

        def ask(these: list[tuple[int, ...]], **more: int) -> list[tuple[int, ...]]:
            answers = pair.ask(prefill, decode, these, **more)
            found.append([(a.device, a.host, a.disk) for a in answers])
            return [answer.output_ids for answer in answers]

        found: list[list[tuple[int, int, int]]] = []
        assert ask(asked) == truths
        assert ask(asked[:2]) == truths[:2]
        assert ask(asked[1:2]) == truths[1:2]
        wait_for_disk(prefill)
        prefill.flush_cache()
        assert ask(asked) == truths
        assert ask(asked * 3, concurrency=8) == truths * 3
        wait_for_disk(prefill)
        prefill.stop()
        prefill.start()
        assert ask(asked) == truths
        held = scrape(prefill)
    computed, from_host, from_device, from_disk, _, after_restart = found
    assert computed == [(0, 0, 0)] * 5
    assert from_host == [(0, N_REUSABLE, 0)] * 2
    assert from_device == [(N_REUSABLE, 0, 0)]
    assert from_disk == [(0, 0, N_REUSABLE)] * 5
    assert after_restart == [(0, 0, N_REUSABLE)] * 5
    assert held.of(names.PINNED_TOKENS, tier="device") == 0
