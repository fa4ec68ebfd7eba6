"""What choosing who decodes adds to an iteration, in microseconds of the scheduler's thread.

With N requests running, SGLang's step is replaced by nothing, so that what is left is ours: the
hooks' work around it. `same` is an iteration in which the same requests run as in the one before,
`changing` one in which one has left and one has joined; in both all decode in time and the policy
is only asked whether they do. `choosing` is one in which they do not: the requests are brought up
to date and the policy chooses (contexts of 32k tokens; a tenth are interactive), without cutting
the batch, which is SGLang's `filter_batch` and depends on the device.

Processor time of the thread, less what reading its clock takes: median and 99th percentile. The
budget for `same` and `changing` at up to 256 requests, checked by --check, is 50 us for the median.

Example:
  python benchmark/micro/iteration.py --check
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np

from tiered_kv.api.slo import Slo
from tiered_kv.api.terms import Terms
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.plugin.cache.metrics_adapter import MetricsRecorder
from tiered_kv.plugin.decode.selection import DecodeSelection
from tiered_kv.plugin.queue.clock_tick import SharedClock, Tick
from tiered_kv.scheduler.cost_model import CostModel
from tiered_kv.scheduler.iteration_policy import iteration_policies

SIZES = (16, 64, 256)
N_ITERATIONS = 2000
BUDGET_US = 50.0
LONG_TOKENS = 32_768
SHORT_TOKENS = 2_048


class Request:
    """Of SGLang's request, what is read."""

    def __init__(self, context_tokens: int, tbt_s: float | None) -> None:
        self.kv_committed_len = context_tokens
        self.output_ids = array("q", [1, 2, 3])
        self.to_finish = None
        self.tiered_kv_terms = Terms(slo=Slo(tbt_s=tbt_s))

    def finished(self) -> bool:
        return False


def request(i: int, context_tokens: int) -> Request:
    return Request(context_tokens, 0.05 if i % 10 == 0 else (0.5 if i % 3 else None))


class Iterations:
    """A scheduler whose decodes take no time."""

    def __init__(self, n: int, context_tokens: int, step_s: float) -> None:
        self.clock = SharedClock(wanted=lambda: True, on_tick=lambda: None)
        costs = CostModel(find_model("Llama-3.1-8B"), find_device("H200-141"), {})
        hierarchy = SimpleNamespace(learn=lambda: None)
        scheduler = SimpleNamespace(
            enable_overlap=False,
            result_queue=(),
            tree_cache=SimpleNamespace(
                hierarchy=hierarchy, parts=SimpleNamespace(metrics=MetricsRecorder())
            ),
        )
        policy = iteration_policies.get("slack")()
        self.selection = DecodeSelection(scheduler, policy, costs, self.clock)
        self.context_tokens, self.step_s = context_tokens, step_s
        self.now_s = 1.0
        self.batch: Any = SimpleNamespace(
            reqs=[request(i, context_tokens) for i in range(n)],
            batch_is_full=False,
            forward_mode=SimpleNamespace(is_decode=lambda: True, is_mixed=lambda: False),
        )
        self._next = n

    def step(self) -> float:
        """Seconds that one iteration takes."""
        self.now_s += self.step_s
        self.clock.take(Tick(self.now_s))
        started = time.thread_time_ns()
        self.selection.update(self.batch, self._update)
        self.selection.batch_to_run(self.batch)
        self.selection.after_result()
        return (time.thread_time_ns() - started) * 1e-9

    def _update(self) -> None:
        self.selection.fits_in_memory(self.batch, self._fits)
        if self.selection._chosen is None:
            self.selection.prepare(self.batch, self._nothing)
        else:
            self.selection.running.some_decode(self.selection._chosen, self.now_s)

    def change(self) -> None:
        self.batch.reqs = [*self.batch.reqs[1:], request(self._next, self.context_tokens)]
        self._next += 1

    @staticmethod
    def _fits(selected_indices: object = None) -> bool:
        return selected_indices != []

    @staticmethod
    def _nothing() -> None:
        pass


def clock_s() -> float:
    """What reading the clock twice takes."""
    times = []
    for _ in range(N_ITERATIONS):
        started = time.thread_time_ns()
        times.append(time.thread_time_ns() - started)
    return float(np.median(times)) * 1e-9


def measure(n: int, kind: str, overhead_s: float) -> tuple[float, float]:
    """(median, 99th percentile) in microseconds."""
    is_long = kind == "choosing"
    run = Iterations(n, LONG_TOKENS if is_long else SHORT_TOKENS, 0.2 if is_long else 0.01)
    times = []
    for i in range(N_ITERATIONS + 50):
        if kind == "changing":
            run.change()
        took_s = run.step()
        if i >= 50:
            times.append((took_s - overhead_s) * 1e6)
    return float(np.median(times)), float(np.percentile(times, 99))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="status 1 if a budget is exceeded")
    options = parser.parse_args()
    overhead_s = clock_s()
    gc.disable()
    is_over = False
    print(f"{'running':>8} {'iteration':>10} {'median us':>10} {'p99 us':>8}")
    for kind in ("same", "changing", "choosing"):
        for n in SIZES:
            median_us, p99_us = measure(n, kind, overhead_s)
            print(f"{n:>8} {kind:>10} {median_us:>10.1f} {p99_us:>8.1f}")
            is_over |= kind != "choosing" and median_us > BUDGET_US
    return int(options.check and is_over)


if __name__ == "__main__":
    sys.exit(main())
