"""Two data-parallel replicas: each with a tree, host memory and a shard of the disk of its own.

As servers of their own, and as ranks of one model with DP attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.client import Answer, generate_all
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.models import tiny_mla_model, tiny_model_for_two_ranks
from support.workload import differences, mixed_requests, serve
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)]

POOL = ("--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128)
N_TOKENS = 300
N_REUSABLE = 288
HOST_TOKENS = 2048


@dataclass(frozen=True)
class Layout:
    """How the replicas are started, and with which model."""

    flags: tuple[Any, ...]
    make_model: Callable[[Path, Path], Path]
    token_bytes: int
    plain_flags: tuple[Any, ...] = ()
    """Of a server with the same answers."""
    n_holders: int = 1
    """Ranks that keep the same KV together."""

    @property
    def host_tokens(self) -> int:
        """Of a replica, as its metrics add up: each rank says what all holders have."""
        return HOST_TOKENS * self.n_holders

    @property
    def host_size(self) -> str:
        """Of each rank."""
        return f"{HOST_TOKENS * self.token_bytes // self.n_holders}B"


DP_ATTENTION = ("--tp-size", 2, "--dp-size", 2, "--enable-dp-attention")
FOUR_RANKS = ("--tp-size", 4, "--dp-size", 2, "--enable-dp-attention")
LAYOUTS = {
    "replicas": Layout(("--dp-size", 2), tiny_model_for_two_ranks, 4096),
    # Sums over two ranks are others than on one.
    "dp attention": Layout(DP_ATTENTION, tiny_mla_model, 1536, DP_ATTENTION),
    "dp attention, pairs": Layout(FOUR_RANKS, tiny_mla_model, 1536, FOUR_RANKS, n_holders=2),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_replicas_answer_as_one_server_does_from_tiers_of_their_own(
    layout: Layout,
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path: Path,
) -> None:
    model = layout.make_model(demo_model, tmp_path / "model")
    asked = [prompts.tokens(f"replicas {i}", N_TOKENS) for i in range(5)]
    load = mixed_requests(prompts, 60, seed=5)
    only_platform = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
    plain_args = [*FLOAT32, *POOL, *layout.plain_flags]
    with make_server("dp_plain", *plain_args, model=model, env=only_platform) as plain:
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
        alone = serve(plain, [one.alone(f"alone {i}") for i, one in enumerate(load)], 4)
    assert len(set(truths)) == 5, "the model ignores its prompts"

    args = [*FLOAT32, *POOL, *layout.flags, "--tiered-kv", *ALWAYS_LOAD]
    args += ["--tiered-kv-host-size", layout.host_size, "--tiered-kv-disk-dir", tmp_path / "disk"]
    args += ["--tiered-kv-disk-size", "400MB", "--tiered-kv-debug-integrity", "--enable-metrics"]

    def ask(server: Server, replica: int, these: list[list[int]]) -> list[Answer]:
        return generate_all(server, these, concurrency=1, routed_dp_rank=replica)

    with make_server("dp", *args, model=model) as server:
        computed = ask(server, 0, asked)
        from_host = ask(server, 0, asked[:2])
        by_the_other = ask(server, 1, asked[:2])
        wait_for_disk(server)
        on_disk = scrape(server)
        assert server.get("/tiered_kv/snapshot").status_code == 200
        server.flush_cache()
        from_disk = ask(server, 0, asked)
        others_disk = ask(server, 1, asked[:3])
        answers = serve(server, load, concurrency=16)
        wait_for_disk(server)
        server.flush_cache()
        near = [
            server.post("/tiered_kv/cache", {"action": action, "token_ids": asked[0]}).json()
            for action in ("prefetch", "drop")
        ]
        dropped = [ask(server, replica, asked[:1])[0] for replica in (0, 1)]
        wait_for_disk(server)
    with make_server("dp_again", *args, model=model) as server:
        after_restart = ask(server, 0, asked)

    # Both replicas carry an order out.
    assert near[0]["replicas"] == 2
    assert near[0]["done"]["host"] == 2 * N_REUSABLE
    assert near[1]["done"]["host"] == 2 * N_REUSABLE
    assert [answer.cached_tokens for answer in dropped] == [0, 0]
    assert [answer.output_ids for answer in dropped] == [truths[0]] * 2
    for some in (computed, from_host, by_the_other, from_disk, others_disk, after_restart):
        assert [answer.output_ids for answer in some] == truths[: len(some)]
    assert not differences(answers, [truth.output_ids for truth in alone])
    assert [answer.cached_tokens for answer in computed] == [0] * 5
    assert [answer.host for answer in from_host] == [N_REUSABLE] * 2
    assert [answer.cached_tokens for answer in by_the_other] == [0] * 2
    assert [answer.disk for answer in from_disk] == [N_REUSABLE] * 5
    assert [answer.disk for answer in others_disk] == [N_REUSABLE, N_REUSABLE, 0]
    assert [answer.disk for answer in after_restart] == [N_REUSABLE] * 5

    pages = [(N_TOKENS + 8 - 1) // 16 * n for n in (5, 2)]
    for replica, n_pages in enumerate(pages):
        here = {"dp_rank": str(replica)}
        assert on_disk.of(names.RESIDENT_TOKENS, tier="disk", **here) == n_pages * 16
        assert on_disk.of(names.CAPACITY_TOKENS, tier="host", **here) == layout.host_tokens
    shards = sorted(path.name for path in (tmp_path / "disk").iterdir() if path.is_dir())
    assert shards == ["shard-0-of-2", "shard-1-of-2"]
