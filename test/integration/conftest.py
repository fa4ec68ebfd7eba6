"""Fixtures of the tests on a real server.

A start takes fifteen to thirty seconds on two cores: servers are shared where the tests allow it,
and pools are small, so that a few hundred tokens fill a tier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.demo_model import host_size
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, BASE_ARGS, FLOAT32, Server
from support.kv_events import KvEventListener
from support.oracle import Oracle
from support.selection import selection_args

PAGE_SIZE = 16


@pytest.fixture(scope="session")
def prompts(demo_model: Path) -> PromptMaker:
    return PromptMaker(demo_model)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def make_server(demo_model: Path, logs: Path) -> Callable[..., Server]:
    """make_server(name, *args, **fields): a server that is not started yet."""

    def make(name: str, *args: object, **fields: object) -> Server:
        fields.setdefault("model", demo_model)
        command = [*BASE_ARGS, *(str(arg) for arg in args)]
        return Server(command, logs / f"{name}.log", **fields)

    return make


@pytest.fixture(scope="session")
def oracle(make_server: Callable[..., Server]) -> Iterator[Oracle]:
    """Plain SGLang in float32, in an environment where our plugin isn't loaded at all.

    Only the CPU platform is: without it stock SGLang doesn't serve here.
    """
    args = ["--page-size", PAGE_SIZE, "--max-total-tokens", 16384, "--chunked-prefill-size", 512]
    only_platform = {"SGLANG_PLUGINS": "tiered_kv_cpu"}
    with make_server("oracle", *FLOAT32, *args, env=only_platform) as server:
        yield Oracle(server)


@pytest.fixture(scope="session")
def kv_events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KvEventListener]:
    """The events of the server `three_tiers`."""
    with KvEventListener(tmp_path_factory.mktemp("zmq")) as listener:
        yield listener


@pytest.fixture(scope="session")
def three_tiers_for_all(
    make_server: Callable[..., Server],
    tmp_path_factory: pytest.TempPathFactory,
    kv_events: KvEventListener,
) -> Iterator[Server]:
    """float32; 1,024 tokens on the device, 4,096 on the host, 1 GB on disk."""
    tiers = ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(4096)]
    tiers += [
        "--tiered-kv-disk-dir",
        tmp_path_factory.mktemp("disk"),
        "--tiered-kv-disk-size",
        "1GB",
    ]
    args = ["--page-size", PAGE_SIZE, "--max-total-tokens", 1024, "--chunked-prefill-size", 256]
    watch = ["--enable-metrics", "--tiered-kv-debug-integrity", *kv_events.server_args]
    with make_server("three_tiers", *FLOAT32, *args, *tiers, *watch) as server:
        yield server


@pytest.fixture(scope="session")
def taking_turns(make_server: Callable[..., Server]) -> Iterator[Server]:
    """float32; some of the running requests decode in nearly every iteration, the others wait.

    Where prompts are computed all decode beside them, as on GPUs.
    """
    mixed = "--enable-mixed-chunk"
    args = selection_args("round-robin", 16384, "--page-size", PAGE_SIZE, mixed)
    with make_server("taking_turns", *args) as server:
        yield server


@pytest.fixture
def three_tiers(three_tiers_for_all: Server) -> Iterator[Server]:
    """The server that most tests share; each uses prompts of its own and leaves a clean log."""
    before = len(three_tiers_for_all.trouble())
    yield three_tiers_for_all
    trouble = three_tiers_for_all.trouble()[before:]
    assert not trouble, "\n".join(trouble) + three_tiers_for_all.tail()
