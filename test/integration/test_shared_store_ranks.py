"""Two ranks over one store, and the events that tell routers what lies there.

Guarantee: each shard of the KV is in the store once; ranks agree on what came from there, also when
one of them has lost pages; events name the store's pages when they are written, and when they are
found there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.client import Answer, generate_all
from harness.metrics import scrape
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from harness.stores import Process, valkey_server
from support.engines import engine_or_skip
from support.kv_events import KvEventListener
from support.models import tiny_mla_model, tiny_model_for_two_ranks
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

N_PROMPTS, N_TOKENS, N_REUSABLE, PAGE = 3, 300, 288, 16
#: Of a prompt and its answer of eight tokens, of which the last has no KV.
N_PAGES = N_PROMPTS * ((N_TOKENS + 8 - 1) // PAGE)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Process]:
    with engine_or_skip(lambda: valkey_server(tmp_path)) as server:
        yield server


def until_stored(server: Server, n_tokens: int) -> None:
    """Both ranks know that all of it is in the store."""
    deadline = time.monotonic() + 60
    while any(
        scrape(server).of(names.RESIDENT_TOKENS, tier="store", tp_rank=rank) < n_tokens
        for rank in "01"
    ):
        assert time.monotonic() < deadline, f"the pages do not arrive{server.tail()}"
        time.sleep(0.5)


def ids(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.output_ids for answer in answers]


@pytest.mark.parametrize(
    ("model_of", "n_shards"),
    [(tiny_model_for_two_ranks, 2), (tiny_mla_model, 1)],
    ids=["a shard each", "the same latents"],
)
def test_two_ranks_share_with_others_what_they_computed(
    model_of: Callable[[Path, Path], Path],
    n_shards: int,
    store: Process,
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path: Path,
) -> None:
    import valkey

    client = valkey.Valkey(port=store.port)
    model = model_of(demo_model, tmp_path / "model")
    args = ["--tp", 2, "--page-size", PAGE, "--max-total-tokens", 1024]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-disk-dir", "none"]
    args += ["--tiered-kv-host-size", "8MB", "--tiered-kv-debug-integrity", "--enable-metrics"]
    args += ["--tiered-kv-store", f"valkey://127.0.0.1:{store.port}"]
    args += ["--tiered-kv-store-write", "all"]
    asked = [prompts.tokens(f"shared by ranks {n}", N_TOKENS) for n in range(N_PROMPTS)]

    with (
        KvEventListener(tmp_path) as events,
        make_server("store_ranks", *FLOAT32, *args, *events.server_args, model=model) as server,
    ):
        computed = generate_all(server, asked, concurrency=1)
        until_stored(server, N_PAGES * PAGE)
        events.collect()
        written = {medium: sorted(hashes) for medium, hashes in events.stored.items()}
        blobs = sorted(client.keys("tiered-kv:*"))

        # As a server does that never saw them: nothing but the store has them.
        server.flush_cache()
        events.collect()
        events.stored.clear()
        from_store = generate_all(server, asked, concurrency=1)
        events.wait_for("EXTERNAL", N_PAGES)
        events.collect()
        found = {medium: set(hashes) for medium, hashes in events.stored.items()}

        # Names are random numbers: half of the pages, of either rank.
        client.delete(*blobs[::2])
        server.flush_cache()
        with_gaps = generate_all(server, asked, concurrency=2)

    assert [answer.cached_tokens for answer in computed] == [0] * N_PROMPTS
    assert len({answer.output_ids for answer in computed}) == N_PROMPTS
    assert len(blobs) == n_shards * N_PAGES
    # One rank publishes, each page once.
    assert len(written["EXTERNAL"]) == N_PAGES
    assert written["EXTERNAL"] == written["CPU_PINNED"] == written["GPU"]

    assert [(a.host, a.disk, a.store) for a in from_store] == [(0, 0, N_REUSABLE)] * N_PROMPTS
    assert ids(from_store) == ids(with_gaps) == ids(computed)
    assert len(found["EXTERNAL"]) == N_PAGES
    assert found["EXTERNAL"] == set(written["EXTERNAL"])
    assert sum(answer.cached_tokens for answer in with_gaps) < N_PROMPTS * N_REUSABLE
