"""What is taken for the time of a pass, where `run_batch` waits for it and where it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.model_executor.forward_batch_info import ForwardMode

from tiered_kv.plugin.passes import launched as launched_passes
from tiered_kv.plugin.passes import step_times
from tiered_kv.plugin.passes.step_times import StepTimes
from tiered_kv.scheduler.calibration import StepObservation


class Observed(list[StepObservation]):
    def observe_step(self, step: StepObservation) -> None:
        self.append(step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(launched_passes.time, "monotonic", lambda: now[0])
    return now


def batch_of(mode: ForwardMode, launch_ts: float, *, consumer: int = -1) -> Any:
    return SimpleNamespace(
        forward_mode=mode,
        launch_ts=launch_ts,
        extend_lens=[30, 20],
        prefix_lens=[0, 64],
        hicache_consumer_index=consumer,
    )


def test_a_synchronous_pass_took_as_long_as_the_call(clock: list[float]) -> None:
    observed = Observed()
    times = StepTimes(observed, synchronous=True)  # type: ignore[arg-type]
    batch = batch_of(ForwardMode.EXTEND, 100.0)
    clock[0] = 100.5
    times.launched(batch)
    clock[0] = 107.0
    times.finished(batch)
    assert observed == [StepObservation(((30, 0), (20, 64)), 0, 0, 0.5)]


def test_passes_on_a_device_run_one_after_the_other(clock: list[float]) -> None:
    observed = Observed()
    times = StepTimes(observed, synchronous=False)  # type: ignore[arg-type]
    first, second = batch_of(ForwardMode.EXTEND, 100.0), batch_of(ForwardMode.EXTEND, 100.1)
    times.launched(first)
    times.launched(second)
    clock[0] = 101.0
    times.finished(first)
    clock[0] = 101.7
    times.finished(second)
    assert [round(step.seconds, 6) for step in observed] == [1.0, 0.7]


@pytest.mark.parametrize("synchronous", [True, False])
def test_passes_that_wait_for_a_load_teach_nothing(clock: list[float], synchronous: bool) -> None:
    observed = Observed()
    times = StepTimes(observed, synchronous=synchronous)  # type: ignore[arg-type]
    batch = batch_of(ForwardMode.EXTEND, 3.0, consumer=4)
    times.launched(batch)
    times.finished(batch)
    assert observed == []


def test_decodes_mixed_into_a_prefill_are_told_apart(clock: list[float]) -> None:
    observed = Observed()
    times = StepTimes(observed, synchronous=True)  # type: ignore[arg-type]
    batch = batch_of(ForwardMode.MIXED, 100.0)
    batch.extend_lens, batch.prefix_lens = [30, 1, 1], [0, 64, 9]
    batch.decoding_reqs = ["a", "b"]
    clock[0] = 100.25
    times.launched(batch)
    assert observed == [StepObservation(((30, 0),), 65 + 10, 2, 0.25)]


def test_one_in_so_many_decodes_is_observed(clock: list[float]) -> None:
    observed = Observed()
    times = StepTimes(observed, synchronous=True)  # type: ignore[arg-type]
    reqs = [SimpleNamespace(origin_input_ids=range(n), output_ids=range(3)) for n in (10, 20)]
    for n in range(2 * step_times.DECODES_PER_OBSERVATION):
        batch = batch_of(ForwardMode.DECODE, float(n))
        batch.reqs = reqs
        batch.tree_cache = SimpleNamespace(saved_tokens=7)
        clock[0] = n + 0.5
        times.launched(batch)
    assert observed == [StepObservation((), 36, 2, 0.5, 7)] * 2


def test_passes_whose_result_never_comes_are_forgotten(clock: list[float]) -> None:
    times = StepTimes(Observed(), synchronous=False)  # type: ignore[arg-type]
    for n in range(100):
        times.launched(batch_of(ForwardMode.EXTEND, float(n)))
    assert len(times._launched) == launched_passes.LAUNCHED_MAX


def test_without_the_flag_nothing_is_touched() -> None:
    scheduler = SimpleNamespace(server_args=SimpleNamespace())
    step_times.after_run_batch(None, scheduler, None)
    step_times.after_batch_result(None, scheduler, None)
