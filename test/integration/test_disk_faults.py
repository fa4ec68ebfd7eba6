"""A disk that fails under a running server: no request fails, no answer changes, it comes back.

The faults are injected below the disk tier's file calls (support/inject/disk_faults.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.client import Answer, generate_all
from harness.demo_model import host_size
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server, ServerError
from support.injection import injected
from support.oracle import Oracle
from tiered_kv.metrics import names

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(600)]

N_TOKENS, N_REUSABLE, N_PROMPTS = 100, 96, 2
RECOVERY_S = 30.0


@dataclass(frozen=True)
class FaultyServer:
    server: Server
    control: Path
    was_degraded: float
    """What the metric said after the start, on a directory that the server cannot read."""

    def break_disk(self, fault: str) -> None:
        self.control.write_text(fault)

    def wait_until_writing(self, poke: Callable[[], object]) -> float:
        """Seconds until the tier writes again; `poke` gives it something to write."""
        began = time.monotonic()
        while time.monotonic() < began + RECOVERY_S:
            if not scrape(self.server).of(names.DISK_DEGRADED):
                return time.monotonic() - began
            poke()
            time.sleep(1)
        raise ServerError(f"the disk tier did not come back{self.server.tail()}")


@pytest.fixture(scope="module")
def faulty(
    make_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FaultyServer]:
    folder = tmp_path_factory.mktemp("faulty")
    control = folder / "fault"
    shard = folder / "disk" / "shard-0-of-1"
    shard.mkdir(parents=True)
    (shard / "FORMAT").write_text('{"format": "tiered-kv-disk", "version": 99}')
    args = ["--page-size", 16, "--max-total-tokens", 1024, "--chunked-prefill-size", 512]
    args += ["--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(2048)]
    args += ["--tiered-kv-disk-dir", folder / "disk", "--tiered-kv-disk-size", "1GB"]
    watch = ["--enable-metrics", "--tiered-kv-debug-integrity"]
    env = injected("disk_faults", TIERED_KV_TEST_FAULT=control)
    with make_server("disk_faults", *FLOAT32, *args, *watch, env=env) as server:
        assert "disk_faults: the disk tier's system calls" in server.log_text()
        wait_for(lambda: scrape(server).of(names.DISK_DEGRADED) == 1.0)
        was_degraded = scrape(server).of(names.DISK_DEGRADED)
        server.post("/hicache/storage-backend/clear").raise_for_status()
        wait_for(lambda: scrape(server).of(names.DISK_DEGRADED) == 0.0)
        yield FaultyServer(server, control, was_degraded)


@pytest.mark.long
def test_a_directory_of_a_newer_version_is_no_reason_not_to_start(faulty: FaultyServer) -> None:
    assert faulty.was_degraded == 1.0
    told = faulty.server.log_text()
    assert "shard-0-of-1 was written by a newer version (in format 99" in told
    assert "is in use after" in told
    assert scrape(faulty.server).of(names.DISK_DEGRADED) == 0.0


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "stops_writes", "loses_reads"),
    [
        ("eio_on_write", True, False),
        ("disk_full", True, False),
        ("eio_on_read", False, True),
        ("short_reads", False, True),
        ("bit_flips", False, True),
        # Who would wait for a disk that does not answer computes.
        ("stall", False, True),
    ],
)
def test_requests_outlive_a_fault_and_the_tier_recovers(
    faulty: FaultyServer,
    oracle: Oracle,
    prompts: PromptMaker,
    fault: str,
    stops_writes: bool,
    loses_reads: bool,
) -> None:
    server = faulty.server

    def prompts_of(what: str) -> list[tuple[int, ...]]:
        return [prompts.tokens(f"{fault} {what} {i}", N_TOKENS) for i in range(N_PROMPTS)]

    def ask(asked: list[tuple[int, ...]]) -> list[Answer]:
        answers = generate_all(server, asked, concurrency=N_PROMPTS)
        truths = oracle.all_output_ids([(prompt, 8) for prompt in asked])
        assert [answer.output_ids for answer in answers] == truths
        return answers

    known, new, later = prompts_of("known"), prompts_of("new"), prompts_of("later")
    ask(known)
    wait_for_disk(server)
    server.flush_cache()
    lines = len(server.log_text().splitlines())

    faulty.break_disk(fault)
    while_broken = ask(known)
    ask(new)
    if stops_writes:
        wait_for_degraded(server)
    faulty.break_disk("none")

    if not loses_reads:
        assert [answer.disk for answer in while_broken] == [N_REUSABLE] * N_PROMPTS
    elif fault == "bit_flips":
        # The last page of every read is damaged; what came before it may be used.
        assert all(answer.disk < N_REUSABLE for answer in while_broken)
    else:
        assert [answer.disk for answer in while_broken] == [0] * N_PROMPTS
    faulty.wait_until_writing(lambda: ask([prompts.tokens(f"{fault} poke {time.time()}", 64)]))
    ask(later)
    wait_for_disk(server)
    server.flush_cache()
    assert [answer.disk for answer in ask(later)] == [N_REUSABLE] * N_PROMPTS
    told = [line for line in server.log_text().splitlines()[lines:] if "Disk tier" in line]
    if stops_writes:
        assert sum("stops writing" in line for line in told) == 1, told
        assert sum("writes again" in line for line in told) == 1, told


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RECOVERY_S
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.3)


def wait_for_degraded(server: Server) -> None:
    deadline = time.monotonic() + RECOVERY_S
    while not scrape(server).of(names.DISK_DEGRADED):
        if time.monotonic() > deadline:
            raise ServerError(f"no metric tells that the disk tier is degraded{server.tail()}")
        time.sleep(0.3)
