"""Passes are told of when they are over, with the time they had the device to themselves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from tiered_kv.plugin.passes import pass_log
from tiered_kv.plugin.passes.launched import LAUNCHED_MAX
from tiered_kv.plugin.passes.pass_log import Pass, PassLog, draw_passes, pace_by_decodes
from tiered_kv.tiers.timeline import PASSES, TimelineFile, read_events


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(pass_log.time, "monotonic", lambda: now[0])
    return now


def batch_of(mode: ForwardMode, launch_ts: float, **fields: Any) -> SimpleNamespace:
    reqs = [SimpleNamespace(origin_input_ids=range(n), output_ids=range(3)) for n in (10, 20)]
    return SimpleNamespace(
        forward_mode=mode,
        launch_ts=launch_ts,
        reqs=reqs,
        extend_lens=[64, 7],
        prefix_lens=[0, 128],
        hicache_consumer_index=-1,
        **fields,
    )


def test_where_passes_run_in_the_call(clock: list[float]) -> None:
    seen: list[Pass] = []
    log = PassLog([seen.append], synchronous=True)
    batch = batch_of(ForwardMode.EXTEND, 99.5)
    batch.hicache_consumer_index = 4
    log.launched(batch)
    log.finished(batch)
    log.launched(batch_of(ForwardMode.DECODE, 99.75))
    assert seen == [
        Pass(ForwardMode.EXTEND, 2, 71, 0, 0, 4, 99.5, 100.0, ((64, 0), (7, 128))),
        Pass(ForwardMode.DECODE, 2, 2, 36, 2, -1, 99.75, 100.0),
    ]


def test_where_passes_queue_on_a_device(clock: list[float]) -> None:
    seen: list[Pass] = []
    log = PassLog([seen.append], synchronous=False)
    first, second = batch_of(ForwardMode.DECODE, 99.0), batch_of(ForwardMode.DECODE, 99.5)
    log.launched(first)
    log.launched(second)
    assert seen == []
    log.finished(first)
    clock[0] = 100.5
    log.finished(second)
    assert [(p.start_s, p.end_s) for p in seen] == [(99.0, 100.0), (100.0, 100.5)]


def test_passes_whose_result_never_comes_are_forgotten(clock: list[float]) -> None:
    log = PassLog([], synchronous=False)
    for n in range(100):
        log.launched(batch_of(ForwardMode.DECODE, float(n)))
    assert len(log._launched) == LAUNCHED_MAX


def test_the_pacer_hears_of_decodes_and_what_they_should_take() -> None:
    heard: list[tuple[float, float]] = []
    pacer: Any = SimpleNamespace(observe_decode=lambda seconds, due: heard.append((seconds, due)))
    model: Any = SimpleNamespace(iteration_s=lambda prefills, context, n: context * n * 1e-3)
    observe = pace_by_decodes(pacer, model)
    observe(Pass(ForwardMode.DECODE, 2, 2, 36, 2, -1, 1.0, 1.25))
    observe(Pass(ForwardMode.EXTEND, 2, 90, 0, 0, -1, 2.0, 2.5))
    observe(Pass(ForwardMode.DECODE, 0, 0, 0, 0, -1, 3.0, 3.5))
    pace_by_decodes(pacer, None)(Pass(ForwardMode.DECODE, 2, 2, 36, 2, -1, 4.0, 4.5))
    assert heard == [(0.25, pytest.approx(0.072)), (0.5, 1.0)]


def test_a_pass_of_both_kinds_is_one_in_which_somebody_decodes(clock: list[float]) -> None:
    """Else writing would be at full speed while everybody decodes beside prefills."""
    heard: list[tuple[float, float]] = []
    pacer: Any = SimpleNamespace(observe_decode=lambda *args: heard.append(args))
    costs: Any = SimpleNamespace(iteration_s=lambda chunks, context, n: (chunks, context, n))
    log = PassLog([pace_by_decodes(pacer, costs)], synchronous=True)
    batch = batch_of(ForwardMode.MIXED, 99.0, decoding_reqs=["one"])
    batch.extend_lens, batch.prefix_lens = [64, 1], [0, 128]
    log.launched(batch)
    assert heard == [(1.0, (((64, 0),), 129, 1))]


def test_passes_are_drawn(tmp_path: Path) -> None:
    timeline = TimelineFile(tmp_path / "trace.json")
    draw_passes(timeline)(Pass(ForwardMode.EXTEND, 2, 90, 0, 0, 5, 1.0, 1.5, ((64, 0), (26, 128))))
    timeline.close()
    events = read_events(tmp_path / "trace.json")
    (row,) = [e["tid"] for e in events if e["args"] == {"name": PASSES}]
    (span,) = [e for e in events if e["ph"] == "X"]
    assert (span["tid"], span["name"]) == (row, "extend 90")
    assert span["dur"] == pytest.approx(0.5e6)
    assert span["args"] == {
        "requests": 2,
        "load": 5,
        "chunks": "64 after 0, 26 after 128",
        "context": 0,
    }
