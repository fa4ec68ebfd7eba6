"""The server's timeline: complete, in order, and with what the forward pass did not wait for.

The server is killed with SIGKILL: what was drawn until then is read from the file it left.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmark.serving.load_timeline import end_of, load_report, loads_within
from harness.client import generate
from harness.demo_model import LAYERS, host_size
from harness.metrics import scrape, wait_for_disk
from harness.prompts import PromptMaker
from harness.server import ALWAYS_LOAD, FLOAT32, Server
from tiered_kv.core.ids import Tier
from tiered_kv.metrics import names
from tiered_kv.tiers.timeline import (
    LAYER_COPIES,
    LAYER_WAITS,
    PASSES,
    REQUESTS,
    read_events,
    rows_of,
    store_reads,
)

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(600)]

FLUSHED_S = 2.5


def test_one_prompt_from_every_tier(
    make_server: Callable[..., Server], prompts: PromptMaker, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    server = make_server(
        "timeline",
        *FLOAT32,
        *("--page-size", 16, "--max-total-tokens", 1024, "--enable-metrics"),
        *("--tiered-kv", *ALWAYS_LOAD, "--tiered-kv-host-size", host_size(4096)),
        *("--tiered-kv-disk-dir", tmp_path / "disk", "--tiered-kv-disk-size", "1GB"),
        *("--tiered-kv-trace-file", trace, "--tiered-kv-write-back-budget", "5"),
    )
    prompt = prompts.tokens("timeline", 800)
    with server:
        computed = generate(server, prompt, 4)
        wait_for_disk(server)
        generate(server, prompts.tokens("timeline, another", 900), 4)
        wait_for_disk(server)
        from_host = generate(server, prompt, 4)
        wait_for_disk(server)
        server.flush_cache()
        from_disk = generate(server, prompt, 4)
        limit = scrape(server).of(names.WRITE_BACK_LIMIT)
        time.sleep(FLUSHED_S)
        server.kill_9()

    assert from_host.output_ids == computed.output_ids == from_disk.output_ids
    assert computed.cached_tokens == 0
    # What was asked in between left a little of it on the device.
    assert from_host.host > 600
    assert from_disk.disk > 700
    # Decoding was observed, and a limit derived from it.
    assert limit > 0

    rows = rows_of(read_events(trace))
    loads = loads_within(rows, 0, float("inf"))
    assert len(loads) == 2
    for load in loads:
        copies = [e for e in rows[LAYER_COPIES] if e["args"]["load"] == load]
        assert [e["args"]["layer"] for e in copies] == list(range(LAYERS))
        assert all(end_of(a) <= b["ts"] + 1 for a, b in itertools.pairwise(copies))
        first_wait = {}
        for wait in rows[LAYER_WAITS]:
            if wait["args"]["load"] == load:
                first_wait.setdefault(wait["args"]["layer"], wait)
        assert list(first_wait) == list(range(LAYERS))
        report = load_report(rows, load)
        assert report.layers == LAYERS
        assert 0 <= report.layers_hidden <= LAYERS
        assert report.waited_ms <= report.pass_ms
    assert (
        sum(int(e["name"].split()[0]) for e in rows[store_reads(Tier.DISK)]) * 16 == from_disk.disk
    )
    assert [e["args"]["tokens"] for e in rows[REQUESTS]] == [from_disk.disk]
    assert rows["device-to-host"]
    assert rows["host-to-disk"]
    modes = [e["name"].split()[0] for e in rows[PASSES]]
    assert modes.count("extend") >= 4
    assert modes.count("decode") >= 3 * 4
