"""The timeline tells what happened, in a file that loads whenever its writer stops, and is bounded.

Over a whole hierarchy it shows the layer pipeline: every layer of a load is announced once, in
order, and no pass has a layer before its copy has ended.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support_tiers.stream_double import Device, DoublePoint, Eager
from support_tiers.tier_rig import N_LAYERS, NAMESPACE, Rig, tokens_of
from tiered_kv.core.errors import ConfigError
from tiered_kv.core.ids import Tier
from tiered_kv.metrics.timeline import Event
from tiered_kv.tiers.hierarchy import KVHierarchy
from tiered_kv.tiers.in_memory import InMemoryStore
from tiered_kv.tiers.timeline import (
    LAYER_COPIES,
    LAYER_WAITS,
    REQUESTS,
    TimelineFile,
    layer_ends,
    read_events,
    rows_of,
    store_reads,
)

pytestmark = pytest.mark.timeout(60)


def rows(path: Path) -> dict[str, list[Event]]:
    """The spans of a file by the name of their row, in the order of their start."""
    return rows_of(read_events(path))


def end_of(event: Event) -> float:
    return float(event["ts"] + event["dur"])


# -- the file ---------------------------------------------------------------------------------


def test_a_closed_file_is_plain_json_with_every_span(tmp_path: Path) -> None:
    timeline = TimelineFile(tmp_path / "trace.json")
    now_s = time.perf_counter()
    for i in range(100):
        timeline.span("copies", f"copy {i}", now_s + i, now_s + i + 0.25, n_bytes=i)
    timeline.counters("limit", bytes_per_s=5.0)
    timeline.close()
    timeline.close()
    timeline.span("copies", "too late", now_s, now_s)
    events = json.loads((tmp_path / "trace.json").read_text())
    spans = rows(tmp_path / "trace.json")["copies"]
    assert [s["name"] for s in spans] == [f"copy {i}" for i in range(100)]
    assert [s["args"]["n_bytes"] for s in spans] == list(range(100))
    assert all(s["dur"] == pytest.approx(0.25e6) for s in spans)
    assert spans[7]["ts"] - spans[0]["ts"] == pytest.approx(7e6)
    assert [e["args"] for e in events if e["ph"] == "C"] == [{"bytes_per_s": 5.0}]
    assert events[-1]["args"] == {"dropped": 0}


def test_spans_of_many_threads_all_arrive(tmp_path: Path) -> None:
    timeline = TimelineFile(tmp_path / "trace.json")

    def work(track: str) -> None:
        for i in range(500):
            timeline.span(track, str(i), 1.0, 2.0)

    threads = [threading.Thread(target=work, args=(f"thread {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        timeline.flush()
        thread.join()
    timeline.close()
    found = rows(tmp_path / "trace.json")
    assert sorted(found) == [f"thread {n}" for n in range(4)]
    for spans in found.values():
        assert sorted(int(s["name"]) for s in spans) == list(range(500))


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_file_whose_writer_was_killed_has_what_was_flushed(
    tmp_path: Path, kill: signal.Signals
) -> None:
    path = tmp_path / "trace.json"
    program = (
        "import sys, time; from pathlib import Path\n"
        "from tiered_kv.tiers.timeline import TimelineFile\n"
        "timeline = TimelineFile(Path(sys.argv[1]))\n"
        "for i in range(20): timeline.span('row', str(i), i, i + 1)\n"
        "timeline.flush()\n"
        "timeline.span('row', 'late', 0, 1)\n"
        "print('flushed', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "flushed\n"
        os.kill(process.pid, kill)
    # The last one may have been flushed in time as well.
    assert [s["name"] for s in rows(path)["row"] if s["name"] != "late"] == [
        str(i) for i in range(20)
    ]


def test_memory_and_file_are_bounded_and_losses_counted(tmp_path: Path) -> None:
    small = TimelineFile(tmp_path / "small.json", bytes_max=2000)
    for i in range(100):
        small.span("row", str(i), 0, 1)
        small.flush()
    small.close()
    assert (tmp_path / "small.json").stat().st_size < 2200
    n_written = len(rows(tmp_path / "small.json")["row"])
    assert 5 < n_written < 40
    assert small.n_dropped == 100 - n_written

    full = TimelineFile(tmp_path / "full.json", waiting_max=10)
    with full._file_lock:  # the flush hangs, as on a slow disk
        for i in range(1000):
            full.span("row", str(i), 0, 1)
    full.close()
    # A flush may have emptied the queue just before it hung.
    assert full.n_dropped >= 1000 - 2 * 10
    assert len(rows(tmp_path / "full.json")["row"]) == 1000 - full.n_dropped


def test_a_file_that_cannot_be_written_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--tiered-kv-trace-file .* cannot be written"):
        TimelineFile(tmp_path / "nowhere" / "trace.json")


# -- what the tiers draw ------------------------------------------------------------------------


@pytest.fixture
def drawn(tmp_path: Path) -> Iterator[tuple[Rig, TimelineFile]]:
    """A rig whose hierarchy draws."""
    rig = Rig(n_device_pages=48, n_host_pages=48)
    slot_bytes = rig.page_format.slot_bytes
    rig.use(InMemoryStore().namespace(NAMESPACE, slot_bytes))
    rig.hierarchy.close(0)
    timeline = rig.context.timeline = TimelineFile(tmp_path / "trace.json")
    rig.hierarchy = KVHierarchy(rig.context, NAMESPACE)
    yield rig, timeline
    timeline.close()


def test_the_layers_of_a_load_come_once_in_order_and_before_they_are_used(
    drawn: tuple[Rig, TimelineFile],
) -> None:
    rig, timeline = drawn
    prompts = [tokens_of(*range(10 * i, 10 * i + 10)) for i in range(3)]
    for prompt in prompts:
        rig.serve(prompt)
        rig.drain()
    rig.copier.up.delay = lambda: 0.02
    for prompt in prompts:
        rig.context.evict_device(48 * rig.page_size)
        assert rig.forest.resident_tokens(Tier.DEVICE) == 0
        request = rig.serve(prompt)
        assert request.n_host > 0
        rig.drain()
    rig.hierarchy.close(1)
    timeline.close()

    found = rows(timeline.path)
    loads = {span["args"]["load"] for span in found[LAYER_COPIES]}
    assert len(loads) == 3
    for load in loads:
        copies = [s for s in found[LAYER_COPIES] if s["args"]["load"] == load]
        waits = [s for s in found[LAYER_WAITS] if s["args"]["load"] == load]
        assert [s["args"]["layer"] for s in copies] == list(range(N_LAYERS))
        assert [s["args"]["layer"] for s in waits] == list(range(N_LAYERS))
        for before, after in itertools.pairwise(copies):
            assert end_of(before) == pytest.approx(after["ts"], abs=1)
        for copy, wait in zip(copies, waits, strict=True):
            # The copy's end is taken after the layer was announced: by less than a moment.
            assert end_of(wait) >= end_of(copy) - 5e3
    assert len(found["device-to-host"]) >= 3
    assert len(found["host-to-disk"]) >= 3
    assert len(found["host-to-device"]) == 3


def test_a_prefetch_draws_its_lookup_its_reads_and_its_request(
    drawn: tuple[Rig, TimelineFile],
) -> None:
    rig, timeline = drawn
    prompt = tokens_of(*range(40))  # more than is looked up at once
    rig.serve(prompt)
    rig.drain()
    rig.context.evict_device(48 * rig.page_size)
    rig.context.evict_host(48)
    n_tokens = rig.prefetch("a request", prompt)
    rig.hierarchy.close(1)
    timeline.close()
    found = rows(timeline.path)
    assert n_tokens > 0
    assert [s["args"]["request"] for s in found["lookup"]] == ["a request"]
    (waited,) = found[REQUESTS]
    assert waited["name"] == "a request"
    assert waited["args"]["tokens"] == n_tokens
    reads = found[store_reads(Tier.DISK)]
    assert sum(int(s["name"].split()[0]) for s in reads) == n_tokens // rig.page_size
    (job,) = found["disk-to-host"]
    assert all(job["ts"] <= s["ts"] and end_of(s) <= end_of(job) for s in reads)
    assert end_of(job) <= end_of(waited)


def test_a_failed_load_draws_no_layers(drawn: tuple[Rig, TimelineFile]) -> None:
    rig, timeline = drawn
    prompt = tokens_of(1, 2, 3)
    rig.serve(prompt)
    rig.drain()
    rig.context.evict_device(48 * rig.page_size)
    rig.copier.fail_at_layer = 1
    assert rig.admit(prompt) is None
    assert rig.hierarchy.load_back.queue.wait(10)
    timeline.close()
    found = rows(timeline.path)
    assert LAYER_COPIES not in found
    (job,) = found["host-to-device"]
    assert job["name"] == "0 pages"


def test_on_a_device_its_points_say_when_a_layer_was_there() -> None:
    told_s = [1.0, 1.1, 9.0]
    assert layer_ends([(at_s, None) for at_s in told_s], 9.5) == told_s
    stream = Device(Eager()).streams["to-device"]
    points = [DoublePoint(stream, at=at_us) for at_us in (100_000, 150_000, 400_000)]
    told = list(zip([1.0, 1.0, 1.1], points, strict=True))
    assert layer_ends(told, 9.0) == pytest.approx([8.7, 8.75, 9.0])
