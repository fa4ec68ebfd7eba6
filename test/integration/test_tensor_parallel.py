"""Two ranks over gloo, in step with each other: with tiers of their own, or with the same.

The demo model has nine heads, so these are small random models with four. Their truth is what the
same server computes for the same prompt, the first time or under a key that nothing is cached for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.client import generate_all
from harness.metrics import Scrape, scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.models import (
    tiny_mla_model,
    tiny_model_for_two_ranks,
    tiny_model_with_one_kv_head,
)
from support.workload import differences, mixed_requests, serve
from tiered_kv.metrics import names

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
        # Three at once are what the host holds for those who wait.
        from_disk = generate_all(server, asked, concurrency=3)

        # Ranks that part over an update, or over one that fails, would wait for each other.
        for path, status in ((model, 200), (tmp_path / "nowhere", 400), (model, 200)):
            body = {"model_path": str(path)}
            assert server.post("/update_weights_from_disk", body).status_code == status
        after_updates = generate_all(server, asked, concurrency=3)
        ordered = [
            server.post("/tiered_kv/cache", {"token_ids": asked[0], **order}).json()
            for order in (
                {"action": "demote"},
                {"action": "prefetch", "tier": "device"},
                {"action": "keep", "seconds": 600},
                {"action": "drop"},
            )
        ]
        after_orders = generate_all(server, asked[:2], concurrency=1)

        load = mixed_requests(prompts, 80, seed=3)
        answers = serve(server, load, concurrency=16)
        truths = serve(server, [r.alone(f"alone {i}") for i, r in enumerate(load)], 4)

    assert [answer.host for answer in from_host] == [288, 288]
    assert [answer.disk + answer.device for answer in from_disk] == [288] * 5
    # What is next in the queue may be on the device ahead of its turn, where there is room.
    assert all(answer.disk > 288 // 2 for answer in from_disk)
    assert all(answer.disk > 288 // 2 for answer in after_updates)
    demoted, near, kept, dropped = ordered
    assert (demoted["tiers"]["device"], demoted["tiers"]["disk"]) == (0, 288)
    assert near["tiers"]["device"] == 288
    # A tenant may keep an eighth of the host's 2,048 tokens.
    assert kept["done"] == {"host": 256, "disk": 288}
    assert kept["beyond_bounds"]
    assert (dropped["nowhere"], dropped["kept"]) == (288, {})
    assert after_orders[0].cached_tokens == 0
    assert after_orders[1].cached_tokens == 288
    assert [a.output_ids for a in after_orders] == [a.output_ids for a in computed[:2]]
    given = [answer.output_ids for answer in (*from_host, *from_disk, *after_updates)]
    assert given == [answer.output_ids for answer in (*computed[:2], *computed, *computed)]
    assert len({answer.output_ids for answer in computed}) == 5, "the model ignores its prompts"
    assert all(truth is not None and truth.cached_tokens == 0 for truth in truths)
    assert not differences(answers, [truth.output_ids for truth in truths])
    assert (tmp_path / "disk" / "shard-0-of-2").is_dir()
    assert (tmp_path / "disk" / "shard-1-of-2").is_dir()


#: Of the latents: 16 tokens of 128 floats on 3 layers.
PAGE_BYTES = 16 * 128 * 4 * 3


def test_latents_that_both_ranks_have_are_kept_once(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_mla_model(demo_model, tmp_path / "model")
    args = ["--tp", 2, "--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-disk-dir", tmp_path / "disk"]
    # Room for 60 pages on each rank, and 95 are served.
    args += ["--tiered-kv-disk-size", "300MB", "--tiered-kv-host-size", f"{60 * PAGE_BYTES}B"]
    args += [*FLOAT32, "--tiered-kv-debug-integrity", "--enable-metrics"]
    asked = [prompts.tokens(f"the same {i}", 300) for i in range(5)]

    with make_server("same_kv", *args, model=model) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_host = generate_all(server, asked, concurrency=1)
        disk_tokens = wait_for_disk(server)
        metrics = scrape(server)
        server.flush_cache()
        # At most half of the host is held for those who wait: room for three.
        from_disk = generate_all(server, asked, concurrency=2)
        load = mixed_requests(prompts, 40, seed=3)
        answers = serve(server, load, concurrency=16)
        truths = serve(server, [r.alone(f"alone {i}") for i, r in enumerate(load)], 4)
        wait_for_disk(server)
    with make_server("same_kv_again", *args, model=model) as server:
        after_restart = generate_all(server, asked, concurrency=2)

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.host + answer.device for answer in from_host] == [288] * 5
    assert sum(answer.host for answer in from_host) >= 288
    for later in (from_disk, after_restart):
        assert [answer.disk + answer.device for answer in later] == [288] * 5
        assert all(answer.disk > 288 // 2 for answer in later)
    for again in (from_host, from_disk, after_restart):
        assert [a.output_ids for a in again] == [a.output_ids for a in computed]
    assert len({answer.output_ids for answer in computed}) == 5, "the model ignores its prompts"
    assert not differences(answers, [truth.output_ids for truth in truths])

    # A page for each 16 tokens of prompt and answer, on the host of both and on disk once: with the
    # 4 KiB in front of it that is all that was written.
    n_pages = 5 * ((300 + 8 - 1) // 16)
    assert disk_tokens == n_pages * 16
    assert_kept_once(metrics, n_pages, PAGE_BYTES, tmp_path / "disk")


def assert_kept_once(metrics: Scrape, n_pages: int, page_bytes: int, disk: Path) -> None:
    """On the host of both ranks, in the room of both, and on `disk` by one of them."""
    for rank in ("0", "1"):
        assert metrics.of(names.CAPACITY_TOKENS, tier="host", tp_rank=rank) == 2 * 60 * 16
        assert metrics.of(names.RESIDENT_TOKENS, tier="host", tp_rank=rank) == n_pages * 16
    written = metrics.of(names.DISK_IO_BYTES, operation="write")
    assert n_pages * page_bytes < written < 1.25 * n_pages * page_bytes
    shards = [path.name for path in disk.iterdir() if path.is_dir()]
    assert shards == ["shard-0-of-1"]


#: Of the one KV head: 16 tokens of keys and values of 64 floats on 4 layers.
HEAD_PAGE_BYTES = 16 * 2 * 64 * 4 * 4


def one_head_args(directory: Path) -> tuple[list[object], list[object]]:
    """What every server of one KV head is given, and what the tiers are beside it."""
    args = ["--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128]
    tiers = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-disk-dir", directory]
    # Room for 60 pages on each rank, and 95 are served.
    tiers += ["--tiered-kv-disk-size", "300MB", "--tiered-kv-host-size", f"{60 * HEAD_PAGE_BYTES}B"]
    return [*args, *FLOAT32, "--enable-metrics"], [*tiers, "--tiered-kv-debug-integrity"]


def test_a_kv_head_that_both_ranks_have_is_kept_once(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    model = tiny_model_with_one_kv_head(demo_model, tmp_path / "model")
    args, tiers = one_head_args(tmp_path / "disk")
    asked = [prompts.tokens(f"one head {i}", 300) for i in range(5)]

    with make_server("one_head", "--tp", 2, *args, *tiers, model=model) as server:
        computed = generate_all(server, asked, concurrency=1)
        from_host = generate_all(server, asked, concurrency=1)
        disk_tokens = wait_for_disk(server)
        metrics = scrape(server)
        server.flush_cache()
        from_disk = generate_all(server, asked, concurrency=2)
    with make_server("one_head_plain", *args, model=model) as server:
        plain = generate_all(server, asked, concurrency=1)

    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.host + answer.device for answer in from_host] == [288] * 5
    assert sum(answer.host for answer in from_host) >= 288
    assert [answer.disk + answer.device for answer in from_disk] == [288] * 5
    assert all(answer.disk > 288 // 2 for answer in from_disk)
    for again in (computed, from_host, from_disk):
        assert [a.output_ids for a in again] == [a.output_ids for a in plain]
    assert len({answer.output_ids for answer in plain}) == 5, "the model ignores its prompts"

    n_pages = 5 * ((300 + 8 - 1) // 16)
    assert disk_tokens == n_pages * 16
    assert_kept_once(metrics, n_pages, HEAD_PAGE_BYTES, tmp_path / "disk")


@pytest.mark.timeout(1200)
def test_another_tp_size_finds_nothing_of_that_and_leaves_it_alone(
    make_server: Callable[..., Server], demo_model: Path, prompts: PromptMaker, tmp_path: Path
) -> None:
    """It names its weights otherwise, since they are cut otherwise."""
    model = tiny_model_with_one_kv_head(demo_model, tmp_path / "model")
    args, tiers = one_head_args(tmp_path / "disk")
    asked = [prompts.tokens(f"whose head {i}", 300) for i in range(2)]

    answers = []
    for name, ranks in (("one_head_2", ["--tp", 2]), ("one_head_1", []), ("again_2", ["--tp", 2])):
        with make_server(name, *ranks, *args, *tiers, model=model) as server:
            answers.append(generate_all(server, asked, concurrency=1))
            wait_for_disk(server)

    assert [[answer.disk for answer in some] for some in answers] == [[0, 0], [0, 0], [288, 288]]
    assert len({tuple(answer.output_ids for answer in some) for some in answers}) == 1
    assert [path.name for path in (tmp_path / "disk").iterdir() if path.is_dir()] == [
        "shard-0-of-1"
    ]
