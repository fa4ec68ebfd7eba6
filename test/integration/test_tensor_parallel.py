"""Two ranks over gloo: each with tiers of its own, in step with the other.

The demo model has nine heads, so this is a small random model with four. Its truth is what the
same server computes for the same prompt under a key that nothing is cached for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.client import generate_all
from harness.metrics import wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.models import tiny_model_for_two_ranks
from support.workload import differences, mixed_requests, serve

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]


def test_two_ranks_stay_in_step(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_model_for_two_ranks(demo_model, tmp_path / "model")
    args = ["--tp", 2, "--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-disk-dir", tmp_path / "disk"]
    # 2 heads of 64 on 4 layers: a token's K and V are 2 kB on each rank, so this is 2,048 tokens.
    args += ["--tiered-kv-disk-size", "400MB", "--tiered-kv-host-size", "4194304B"]
    watch = ["--tiered-kv-debug-integrity", "--enable-metrics"]
    asked = [prompts.tokens(f"ranks {i}", 300) for i in range(5)]

    with make_server("two_ranks", *FLOAT32, *args, *watch, model=model) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_host = generate_all(server, asked[:2], concurrency=1)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=4)

        # Ranks that part over an update, or over one that fails, would wait for each other.
        for path, status in ((model, 200), (tmp_path / "nowhere", 400), (model, 200)):
            body = {"model_path": str(path)}
            assert server.post("/update_weights_from_disk", body).status_code == status
        after_updates = generate_all(server, asked, concurrency=4)

        load = mixed_requests(prompts, 80, seed=3)
        answers = serve(server, load, concurrency=16)
        truths = serve(server, [r.alone(f"alone {i}") for i, r in enumerate(load)], 4)

    assert [answer.host for answer in from_host] == [288, 288]
    assert [answer.disk + answer.device for answer in from_disk] == [288] * 5
    # What is next in the queue may be on the device ahead of its turn, where there is room.
    assert all(answer.disk > 288 // 2 for answer in from_disk)
    assert all(answer.disk > 288 // 2 for answer in after_updates)
    given = [answer.output_ids for answer in (*from_host, *from_disk, *after_updates)]
    assert given == [answer.output_ids for answer in (*computed[:2], *computed, *computed)]
    assert len({answer.output_ids for answer in computed}) == 5, "the model ignores its prompts"
    assert all(truth is not None and truth.cached_tokens == 0 for truth in truths)
    assert not differences(answers, [truth.output_ids for truth in truths])
    assert (tmp_path / "disk" / "shard-0-of-2").is_dir()
    assert (tmp_path / "disk" / "shard-1-of-2").is_dir()
