"""Two servers and a store that they share: what one computed, the other serves.

Guarantee: a server with nothing of its own starts warm, its answers are those of plain SGLang, and
whatever becomes of the store, no request fails and nothing wrong is served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.client import Answer, generate, generate_all
from harness.demo_model import host_size
from harness.metrics import scrape
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from harness.stores import Mooncake, Process, mooncake_environment, valkey_server
from support.engines import engine_or_skip
from support.python_path import ahead_on_path
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

N_TOKENS = 400
N_REUSABLE = 384
KEY = "5a" * 32


@dataclass
class Cluster:
    """Two servers over one store, and the store."""

    a: Server
    b: Server
    store: Any

    def computed(self, prompts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Server A computes them, and what is long is in the store then; returns its answers."""
        before = scrape(self.a).of(names.TRANSFER_BYTES, source="host", target="store")
        answers = generate_all(self.a, prompts, concurrency=1)
        assert [answer.cached_tokens for answer in answers] == [0] * len(prompts)
        self.settle(self.a, before)
        return ids(answers)

    def settle(self, server: Server, more_than: float = -1.0) -> None:
        """Nothing is on its way to the store any more."""
        deadline, quiet = time.monotonic() + 60, 0
        while quiet < 3:
            now = scrape(server)
            pending = now.of(names.DEFERRED_NODES) + now.of(names.QUEUE_DEPTH)
            sent = now.of(names.TRANSFER_BYTES, source="host", target="store")
            quiet = quiet + 1 if pending == 0 and sent > more_than else 0
            assert time.monotonic() < deadline, f"the pages do not arrive{server.tail()}"
            time.sleep(0.6)

    def degraded(self, server: Server) -> bool:
        return scrape(server).of(names.STORE_DEGRADED) == 1

    def until(self, done: Callable[[], bool], timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, f"it does not come back{self.b.tail()}"
            time.sleep(0.5)


def tier_args(address: str, *more: str) -> list[str]:
    args = ["--page-size", "16", "--max-total-tokens", "2048", "--chunked-prefill-size", "256"]
    args += ["--tiered-kv", "--tiered-kv-disk-dir", "none", *ALWAYS_LOAD]
    args += ["--tiered-kv-host-size", host_size(4096), "--enable-metrics"]
    return [*args, "--tiered-kv-debug-integrity", "--tiered-kv-store", address, *more]


def started(
    make_server: Callable[..., Server],
    address: str,
    names_: tuple[str, ...],
    *more: str,
    **env: str,
) -> list[Server]:
    return [
        make_server(
            name, *FLOAT32, *tier_args(address, *more), env={"TIERED_KV_STORE_KEY": KEY, **env}
        )
        for name in names_
    ]


def both_up(stack: ExitStack, a: Server, b: Server, store: Any) -> Cluster:
    """A start leaves a core idle most of the time: both at once."""
    with ThreadPoolExecutor(2) as pool:
        for starting in [pool.submit(server.start) for server in (a, b)]:
            starting.result()
    for server in (a, b):
        stack.callback(server.kill_9)
        stack.push(server.__exit__)
    return Cluster(a, b, store)


@pytest.fixture(scope="module")
def valkey_cluster(
    make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    server = engine_or_skip(lambda: valkey_server(tmp_path_factory.mktemp("valkey"), "512mb"))
    with ExitStack() as stack:
        stack.enter_context(server)
        address = f"valkey://127.0.0.1:{server.port}"
        a, b = started(make_server, address, ("valkey-a", "valkey-b"), "--tiered-kv-store-encrypt")
        yield both_up(stack, a, b, server)


@pytest.fixture(scope="module")
def mooncake_cluster(
    make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    store = engine_or_skip(lambda: Mooncake(tmp_path_factory.mktemp("mooncake")))
    with ExitStack() as stack:
        stack.enter_context(store)
        address = f"mooncake://{store.address}?replicas=2"
        a, b = started(make_server, address, ("mooncake-a", "mooncake-b"), **mooncake_environment())
        yield both_up(stack, a, b, store)


@pytest.fixture(params=["valkey", "mooncake"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    found: Cluster = request.getfixturevalue(f"{request.param}_cluster")
    return found


def ids(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.output_ids for answer in answers]


def test_what_one_computed_the_other_serves(cluster: Cluster, prompts: PromptMaker) -> None:
    asked = [prompts.tokens(f"shared {n}", N_TOKENS) for n in range(3)]
    expected = cluster.computed(asked)

    answers = generate_all(cluster.b, asked, concurrency=1, slo={"report": True})

    assert [(a.device, a.host, a.disk, a.store) for a in answers] == [(0, 0, 0, N_REUSABLE)] * 3
    assert answers[0].meta_info["cached_tokens_details"]["storage_backend"] == "store"
    report = answers[0].meta_info["tiered_kv"]["cached_tokens"]
    assert report == {"device": 0, "host": 0, "disk": 0, "store": N_REUSABLE}
    assert ids(answers) == expected
    seen = scrape(cluster.b)
    assert seen.of(names.HIT_TOKENS, tier="store") >= 3 * N_REUSABLE
    # Gauges are refreshed once a second.
    deadline = time.monotonic() + 10
    while scrape(cluster.b).of(names.RESIDENT_TOKENS, tier="store") < 3 * N_REUSABLE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert seen.of(names.STORE_CALLS, operation="read", outcome="ok") >= 3
    assert seen.of(names.STORE_DEGRADED) == 0


def test_tenants_are_apart(valkey_cluster: Cluster, prompts: PromptMaker) -> None:
    prompt = prompts.tokens("salted", N_TOKENS)
    for _ in range(2):
        generate(valkey_cluster.a, prompt, cache_salt="mine")
    valkey_cluster.settle(valkey_cluster.a)
    assert generate(valkey_cluster.b, prompt, cache_salt="other's").cached_tokens == 0
    assert generate(valkey_cluster.b, prompt).cached_tokens == 0
    assert generate(valkey_cluster.b, prompt, cache_salt="mine").store == N_REUSABLE


def test_openai_usage_says_that_it_was_the_store(
    valkey_cluster: Cluster, prompts: PromptMaker
) -> None:
    prompt = list(prompts.tokens("openai", N_TOKENS))
    valkey_cluster.computed([tuple(prompt)])
    body = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0}
    body["return_cached_tokens_details"] = True
    answer = valkey_cluster.b.post("/v1/completions", body).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == N_REUSABLE
    details = answer["sglext"]["cached_tokens_details"]
    assert (details["storage"], details["storage_backend"]) == (N_REUSABLE, "store")


def test_wrong_bytes_in_the_store_are_computed(
    valkey_cluster: Cluster, prompts: PromptMaker
) -> None:
    import valkey

    cluster = valkey_cluster
    asked = [prompts.tokens(f"wrong {n}", N_TOKENS) for n in range(4)]
    client = valkey.Valkey(port=cluster.store.port)
    client.flushall()
    expected = cluster.computed(asked)
    blobs = {key: client.get(key) for key in client.keys("tiered-kv:*")}
    assert len(blobs) >= 4 * N_REUSABLE // 16
    for n, (key, blob) in enumerate(blobs.items()):
        assert isinstance(blob, bytes)
        middle = len(blob) // 2
        client.set(
            key,
            (
                blob[:middle] + bytes([blob[middle] ^ 1]) + blob[middle + 1 :],
                blob[:middle],
                b"",
                next(other for other in blobs.values() if other != blob),
            )[n % 4],
        )

    answers = generate_all(cluster.b, asked, concurrency=1)

    assert ids(answers) == expected
    assert [answer.cached_tokens for answer in answers] == [0] * 4
    assert scrape(cluster.b).of(names.STORE_BAD_PAGES) >= 4
    assert not cluster.degraded(cluster.b)


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_valkey_is_lost_under_load_and_comes_back(
    valkey_cluster: Cluster, prompts: PromptMaker, how: str
) -> None:
    cluster, store = valkey_cluster, valkey_cluster.store
    lose, bring_back = {
        "killed": (store.kill_9, store.start),
        "frozen": (store.freeze, store.thaw),
    }[how]
    _lost_and_back(cluster, prompts, how, lose, bring_back)


def _lost_and_back(
    cluster: Cluster,
    prompts: PromptMaker,
    how: str,
    lose: Callable[[], Any],
    bring_back: Callable[[], Any],
) -> None:
    asked = [prompts.tokens(f"{how} {n}", N_TOKENS) for n in range(6)]
    expected = cluster.computed(asked)
    with ThreadPoolExecutor(1) as pool:
        during = pool.submit(generate_all, cluster.b, asked, 8, 2)
        time.sleep(0.3)
        lose()
        answers = during.result(timeout=120)
    assert ids(answers) == expected
    # While it is away everything is served as without it.
    cluster.b.flush_cache()
    assert ids(generate_all(cluster.b, asked, concurrency=2)) == expected
    assert cluster.degraded(cluster.b)
    bring_back()

    again = [prompts.tokens(f"{how} again {n}", N_TOKENS) for n in range(2)]

    def is_shared() -> bool:
        generate_all(cluster.a, again, concurrency=1)
        cluster.b.flush_cache()
        return all(a.store == N_REUSABLE for a in generate_all(cluster.b, again, concurrency=1))

    cluster.until(is_shared)
    cluster.until(lambda: not cluster.degraded(cluster.b))
    log = cluster.b.log.read_text()
    assert "because of an error" in log
    assert "again after" in log


@pytest.mark.parametrize("who", ["owner", "master"])
def test_mooncake_is_lost_under_load_and_comes_back(
    mooncake_cluster: Cluster, prompts: PromptMaker, who: str
) -> None:
    store: Mooncake = mooncake_cluster.store
    process: Process = store.master if who == "master" else store.owners[0]
    if who == "owner":
        # The other replica serves: nothing is lost at all.
        asked = [prompts.tokens(f"replica {n}", N_TOKENS) for n in range(3)]
        expected = mooncake_cluster.computed(asked)
        process.kill_9()
        mooncake_cluster.until(
            lambda: _served_from_the_store(mooncake_cluster, asked, expected), 60.0
        )
        process.launch()
        return
    _lost_and_back(mooncake_cluster, prompts, who, process.kill_9, process.start)


def _served_from_the_store(
    cluster: Cluster, asked: list[tuple[int, ...]], expected: list[tuple[int, ...]]
) -> bool:
    cluster.b.flush_cache()
    answers = generate_all(cluster.b, asked, concurrency=1)
    assert ids(answers) == expected
    return all(answer.store == N_REUSABLE for answer in answers)


def test_a_server_that_stops_leaves_what_it_has_to_the_others(
    cluster: Cluster, prompts: PromptMaker
) -> None:
    """What was used once only. (The last test of the cluster: B is not started again.)"""
    asked = prompts.tokens("leaving", 40)
    computed = generate(cluster.b, asked)
    assert computed.cached_tokens == 0
    cluster.settle(cluster.b)
    cluster.b.stop()
    answer = generate(cluster.a, asked)
    assert (answer.store, answer.output_ids) == (32, computed.output_ids)
    cluster.b.process = None


def test_without_its_client_the_option_is_refused(
    make_server: Callable[..., Server], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'valkey' else find(name, *a)\n"
    )
    server = make_server(
        "refused",
        *tier_args("valkey://127.0.0.1:1"),
        env={"PYTHONPATH": ahead_on_path(tmp_path)},
    )
    assert server.launch().wait_for_refusal() == 2
    assert "pip install 'sglang-tiered-kv[valkey]'" in server.log.read_text()
