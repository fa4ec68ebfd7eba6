"""What `benchmark/serving/load_timeline.py` says of a timeline whose answer is known."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from benchmark.serving.load_timeline import Question, load_report, loads_within, report
from tiered_kv.core.ids import Tier
from tiered_kv.tiers.timeline import (
    LAYER_COPIES,
    LAYER_WAITS,
    PASSES,
    TimelineFile,
    draw_layers,
    draw_waits,
    read_events,
    rows_of,
    store_reads,
)


def draw(path: Path) -> tuple[float, TimelineFile]:
    """Load 3 of three layers, which take 10 ms each from 100 ms on, and a pass from 105 ms on.

    The pass wants them at 105 (waits 5), 125 (there since 120) and 126 ms (waits 4).
    """
    timeline = TimelineFile(path)
    zero = time.perf_counter()
    draw_layers(timeline, 3, zero + 0.1, [zero + 0.11, zero + 0.12, zero + 0.13])
    wait = draw_waits(timeline)
    wait(3, 0, zero + 0.105, zero + 0.11)
    wait(3, 0, zero + 0.111, zero + 0.111)
    wait(3, 1, zero + 0.125, zero + 0.125)
    wait(3, 2, zero + 0.126, zero + 0.13)
    timeline.span(PASSES, "extend 9", zero + 0.105, zero + 0.205, requests=1, load=3)
    timeline.span(PASSES, "decode 1", zero + 0.3, zero + 0.31, requests=1, load=-1)
    timeline.span(store_reads(Tier.DISK), "4 pages", zero + 0.05, zero + 0.09, op=1)
    timeline.close()
    return zero, timeline


def test_a_load_is_told_by_what_the_pass_did_not_wait_for(tmp_path: Path) -> None:
    draw(tmp_path / "trace.json")
    rows = rows_of(read_events(tmp_path / "trace.json"))
    found = load_report(rows, 3)
    assert (found.layers, found.layers_hidden) == (3, 1)
    assert found.copy_ms == pytest.approx(30, abs=0.01)
    assert found.waited_ms == pytest.approx(9, abs=0.01)
    assert found.hidden_share == pytest.approx(0.7, abs=0.001)
    assert found.pass_ms == pytest.approx(100, abs=0.01)
    assert found.copy_under_pass_ms == pytest.approx(25, abs=0.01)
    with pytest.raises(ValueError, match="only parts of load 4"):
        load_report(rows, 4)


@pytest.mark.parametrize("missing", [LAYER_COPIES, LAYER_WAITS, PASSES])
def test_a_timeline_that_lacks_a_part_is_no_evidence(tmp_path: Path, missing: str) -> None:
    draw(tmp_path / "trace.json")
    rows = rows_of(read_events(tmp_path / "trace.json"))
    rows[missing] = rows[missing][:-1] if missing is LAYER_WAITS else []
    with pytest.raises(ValueError, match="only parts of load 3"):
        load_report(rows, 3)


def test_requests_are_told_what_happened_in_their_time(tmp_path: Path) -> None:
    zero, _ = draw(tmp_path / "trace.json")
    events = read_events(tmp_path / "trace.json")
    assert loads_within(rows_of(events), 0, float("inf")) == [3]
    before = Question("before", zero, zero + 0.04, 10, {"device": 0})
    during = Question("during", zero + 0.045, zero + 0.21, 20, {"host": 16})
    first, second = report([before, during], events)
    assert (first["loads"], first["disk_reads_ms"]) == ([], 0)
    assert second["disk_reads_ms"] == pytest.approx(40, abs=0.01)
    assert second["request_ms"] == pytest.approx(165, abs=0.1)
    assert [load["layers"] for load in second["loads"]] == [3]
