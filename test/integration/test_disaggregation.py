"""A prefill server with tiers, and plain servers that decode what it computes.

Guarantee: answers are those of one plain server, wherever the prompt's KV came from; what was
computed for callers and decode servers that have gone is found by the next.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from harness.client import generate_all, post_generate
from harness.gateway import Gateway
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from support.engines import engine_or_skip
from support.models import tiny_model_for_two_ranks
from support.pairs import Pair, both_up
from tiered_kv.metrics import names
from tiered_kv.plugin.upstream.installed import installed

pytestmark = [
    *(pytest.mark.server, pytest.mark.long, pytest.mark.timeout(1200)),
    pytest.mark.skipif(installed() != "0.5.17", reason="refused: docs/releases.md"),
]

POOL = ("--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 128)
DECODE_POOL = ("--page-size", 16, "--max-total-tokens", 4096)
N_TOKENS = 300
N_REUSABLE = 288
N_PROMPTS = 12
ONLY_PLATFORM = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
#: What both say of requests that have lost the other, or their caller.
GONE = (r"[Tt]ransfer failed", r"bootstrap failed", r"handshake failed", r"Lost connection")


@dataclass
class Servers:
    """Both servers of a pair, and what plain SGLang answers to each of `prompts`."""

    pair: Pair
    prefill: Server
    decode: Server
    prompts: list[tuple[int, ...]]
    truths: list[tuple[int, ...]]
    disk: Path
    found: list[list[tuple[int, int, int]]] = field(default_factory=list)
    """Of the requests of each call of `ask`: tokens from device, host and disk."""

    def ask(self, which: Sequence[int], concurrency: int = 1, **extra: object) -> None:
        """The answers must be the truth."""
        prompts = [self.prompts[i] for i in which]
        answers = self.pair.ask(
            self.prefill, self.decode, prompts, concurrency=concurrency, **extra
        )
        self.found.append([(a.device, a.host, a.disk) for a in answers])
        assert [a.output_ids for a in answers] == [self.truths[i] for i in which]

    def settle(self) -> None:
        """Nothing of any request is held on the prefill server."""
        deadline = time.monotonic() + 60
        while scrape(self.prefill).of(names.PINNED_TOKENS, tier="device"):
            assert time.monotonic() < deadline, f"KV stays pinned{self.prefill.tail()}"
            time.sleep(1.0)

    def begin(self, which: int, n_tokens: int, **extra: object) -> threading.Thread:
        """Asks both for a long answer, whatever becomes of it."""
        body = self.pair.body(self.prompts[which], n_tokens, **extra)

        def ask(server: Server) -> None:
            with contextlib.suppress(requests.RequestException):  # its server may be killed
                post_generate(server, body)

        def ask_both() -> None:
            threads = [threading.Thread(target=ask, args=(s,)) for s in (self.prefill, self.decode)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        thread = threading.Thread(target=ask_both)
        thread.start()
        return thread


@pytest.fixture(scope="module")
def servers(
    make_server: Callable[..., Server],
    demo_model: Path,
    prompts: PromptMaker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("handed-over")
    model = tiny_model_for_two_ranks(demo_model, folder / "model")
    asked = [prompts.tokens(f"handed over {i}", N_TOKENS) for i in range(N_PROMPTS)]
    plain = make_server("pd_plain", *FLOAT32, *POOL, model=model, env=ONLY_PLATFORM)
    pair = engine_or_skip(lambda: Pair(make_server, "pd", *FLOAT32, model=model, expected=GONE))
    # 2,048 tokens on the host.
    tiers = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", "8388608B"]
    tiers += ["--tiered-kv-disk-dir", folder / "disk", "--tiered-kv-disk-size", "400MB"]
    prefill = pair.prefill(*POOL, *tiers, "--tiered-kv-debug-integrity", "--enable-metrics")
    decode = pair.decode(*DECODE_POOL, **ONLY_PLATFORM)
    with ExitStack() as stack:
        stack.callback(plain.kill_9)
        for server in (prefill, decode):
            stack.push(server.__exit__)
        both_up(plain, prefill, decode)
        truths = [answer.output_ids for answer in generate_all(plain, asked, concurrency=1)]
        assert len(set(truths)) == N_PROMPTS, "the model ignores its prompts"
        plain.stop()
        yield Servers(pair, prefill, decode, asked, truths, folder / "disk")


def test_prompts_come_from_every_tier(servers: Servers) -> None:
    five = range(5)
    servers.found.clear()
    servers.ask(five)
    servers.ask([0, 1])
    servers.ask([1])
    wait_for_disk(servers.prefill)
    servers.prefill.flush_cache()
    servers.ask(five)
    computed, from_host, from_device, from_disk = servers.found
    assert computed == [(0, 0, 0)] * 5
    assert from_host == [(0, N_REUSABLE, 0)] * 2
    assert from_device == [(N_REUSABLE, 0, 0)]
    assert from_disk == [(0, 0, N_REUSABLE)] * 5
    servers.ask([*five] * 3, concurrency=8, slo={"class": "interactive"})
    servers.settle()


def test_through_a_gateway(servers: Servers, tmp_path: Path) -> None:
    flags = ["--pd-disaggregation", "--prefill", servers.prefill.url]
    flags += [str(servers.pair.bootstrap_port), "--decode", servers.decode.url]
    body = {"input_ids": list(servers.prompts[0]), "slo": {"class": "interactive"}}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    log = tmp_path / "gateway.log"
    with Gateway([], log, flags=flags, waits_for_workers=False) as gateway:
        url, deadline = f"http://127.0.0.1:{gateway.port}/generate", time.monotonic() + 60
        while (answer := requests.post(url, json=body, timeout=60)).status_code == 503:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(1.0)
    assert tuple(answer.json()["output_ids"]) == servers.truths[0], log.read_text()


def test_callers_that_go_away(servers: Servers) -> None:
    rids, threads = [], []
    for which in (5, 6, 7):
        for n in range(2):
            rids.append(f"gone {which} {n}")
            threads.append(servers.begin(which, 60, rid=rids[-1]))
    for n, rid in enumerate(rids):
        time.sleep(0.05 * n)
        for server in (servers.prefill, servers.decode):
            server.post("/abort_request", {"rid": rid})
    for thread in threads:
        thread.join()
    servers.settle()
    servers.ask([5, 6, 7])


def test_what_a_decode_server_takes_with_it_and_what_a_restart_leaves(servers: Servers) -> None:
    servers.ask([8, 9, 10, 11])
    threads = [servers.begin(which, 200) for which in (8, 9, 10, 11)]
    time.sleep(0.7)
    servers.decode.kill_9()
    for thread in threads:
        thread.join()
    servers.settle()
    assert servers.prefill.get("/health").status_code == 200
    wait_for_disk(servers.prefill)
    servers.prefill.stop()
    assert (servers.disk / "shard-0-of-1" / "index.sqlite").exists()
    assert not list(servers.disk.rglob("*-wal")), "it was killed before its disk tier was closed"
    both_up(servers.prefill, servers.decode)
    servers.found.clear()
    servers.ask(range(12))
    assert servers.found[0] == [(0, 0, N_REUSABLE)] * 12
    servers.settle()
