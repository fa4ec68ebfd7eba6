"""How long one request-level decision keeps the scheduler's thread busy, policy by policy.

With N requests waiting and 128 running, a decision is what a step asks of a policy: one arrival,
news that more is cached of two who wait, the plan (16 requests), the forecast if there is one, and
one admission. N stays the same throughout. Prompts are 2,000 tokens in pages of 64; three of four
share their first half with others of their document; a third of it is cached. The classes are 60%
interactive, 30% standard, 10% batch, and arrivals span the last 30 seconds, so that some can be in
time and most cannot any more. They are calls of 1,000 programs of 100 tenants; each third program
has a deadline of its own.

Times are microseconds of the thread's processor time, so that they show the code and not what else
the machine was doing, less what reading that clock takes: median, 99th percentile and the longest.
`burst` is the first plan after all N arrived in one instant. The budgets of the policy slack,
checked by --check, hold for the 99th percentile: 1,000 us with 1,000 waiting, 5,000 us with 10,000.

A policy called sglang:NAME is SGLang 0.5.23's own: one `SchedulePolicy.calc_priority` over the same
queue and its own prefix cache with the same documents in it. That is less than a decision of ours,
which hears of arrivals and admissions as well; who is admitted is found out later, by both.

Examples:
  python -m benchmark.micro.scheduler --check                   the table, and status 1 if over
  python -m benchmark.micro.scheduler --out benchmark/results   with result file and plot
  python -m benchmark.micro.scheduler --policies slack,sglang:lpm
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmark.micro.scheduler_load import (
    N_PROGRAMS,
    N_TENANTS,
    PAGE_SIZE,
    PROMPT_TOKENS,
    SPAN_S,
    Traffic,
    timed,
)
from benchmark.micro.upstream_order import PREFIX, UpstreamServer
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.ids import Tier
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.cost_model import CostModel, EdgeCost
from tiered_kv.scheduler.plan import PLAN_LIMIT
from tiered_kv.scheduler.request import QueuedRequest
from tiered_kv.scheduler.request_policy import (
    ForecastingPolicy,
    SchedulerState,
    request_policies,
)
from tiered_kv.scheduler.waiting import WaitingQueue

N_RUNNING = 128
QUEUES = (100, 1_000, 10_000)
BUDGETS_US = {1_000: 1_000.0, 10_000: 5_000.0}
CHECKED = "slack"
WARM_UP, DECISIONS_MIN = 10, 30
ROW_US = 20e6  # of decisions: those that take a second each are fewer


@dataclass(frozen=True)
class Row:
    """One policy at one length of the queue."""

    policy: str
    n_waiting: int
    n_decisions: int
    median_us: float
    p99_us: float
    longest_us: float
    burst_us: float

    def __str__(self) -> str:
        times = (self.median_us, self.p99_us, self.longest_us, self.burst_us)
        return f"{self.policy:<30}{self.n_waiting:>8}" + "".join(f"{t:>12.1f}" for t in times)


class Server:
    """A queue that stays equally long, and a policy that is told of it."""

    def __init__(self, policy: str, n_waiting: int) -> None:
        self.traffic = traffic = Traffic()
        self.policy = request_policies.get(policy)()
        edge = EdgeCost(50e9, 1e-5)
        self.costs = CostModel(
            find_model("Llama-3.1-8B"),
            find_device("H200-141"),
            {(Tier.HOST, Tier.DEVICE): edge, (Tier.DEVICE, Tier.HOST): edge},
        )
        self.waiting = WaitingQueue(traffic.forest)
        for document in traffic.cached_documents:
            pages = range(len(document) // PAGE_SIZE)
            traffic.forest.insert(traffic.root, document, pages)
        for index in range(n_waiting):
            traffic.now_s = SPAN_S * index / n_waiting
            self._arrive()
        self.step_s = SPAN_S / n_waiting
        self.running = [traffic.request() for _ in range(N_RUNNING)]
        for request in self.running:
            request.first_token_s, request.output_tokens = traffic.now_s, 1

    def _arrive(self) -> None:
        """A request joins the queue; the policy is told."""
        request = self.traffic.request()
        self.waiting.add(request)
        self.policy.on_arrival(request, self.traffic.now_s)

    def _state(self) -> SchedulerState:
        return SchedulerState(
            now_s=self.traffic.now_s,
            waiting=self.waiting,
            held={},
            running=self.running,
            decode_context_tokens=N_RUNNING * PROMPT_TOKENS,
            processed_prefill_tokens=self.traffic.processed_tokens,
            chunk_tokens=8192,
            costs=self.costs,
            available_tokens=400_000,
        )

    def burst(self) -> float:
        """Microseconds of the first plan after all arrived."""
        return timed(lambda: self.policy.plan(self._state(), PLAN_LIMIT))

    def decision(self) -> float:
        """One step; returns microseconds of what the policy did."""
        traffic = self.traffic
        traffic.now_s += self.step_s
        new = traffic.request()
        self.waiting.add(new)
        changed = traffic.random.sample(list(self.waiting.requests), 2)
        state, policy, now_s = self._state(), self.policy, traffic.now_s
        news = [self.waiting.get(request_id) for request_id in changed]

        def decide() -> None:
            policy.on_arrival(new, now_s)
            for request in news:
                policy.on_cached_change(request, now_s)
            order = policy.plan(state, PLAN_LIMIT).order
            if isinstance(policy, ForecastingPolicy):
                policy.forecast(state)
            # Whom a plan leaves out waits for others: then nobody is admitted in this step.
            first = order[0] if order else None
            if first is not None:
                request = self.waiting.get(first)
                self.waiting.remove(request)
                policy.on_admission(request, now_s)
                admitted.append(request)

        admitted: list[QueuedRequest] = []
        microseconds = timed(decide)
        for request in admitted:
            request.output_tokens = 1
            policy.on_finish(request, now_s)
        if not admitted:
            self.waiting.remove(new)
            policy.on_abort(new, now_s)
        return microseconds


def _nothing() -> None:
    """What it takes to read the clock twice."""


def measure(policy: str, n_waiting: int, n_decisions: int) -> Row:
    """One row of the table; raises ImportError if SGLang has no such order here."""
    server = (UpstreamServer if policy.startswith(PREFIX) else Server)(policy, n_waiting)
    gc.collect()
    gc.freeze()
    burst_us = server.burst()
    usual_us = float(np.median([server.decision() for _ in range(WARM_UP)]))
    n_decisions = min(n_decisions, max(DECISIONS_MIN, int(ROW_US / max(usual_us, 1.0))))
    clock_us = float(np.median([timed(_nothing) for _ in range(200)]))
    times = [max(0.0, server.decision() - clock_us) for _ in range(n_decisions)]
    gc.unfreeze()
    median, p99 = np.quantile(times, (0.5, 0.99))
    return Row(policy, n_waiting, n_decisions, float(median), float(p99), max(times), burst_us)


def plot(rows: list[Row], path: Path) -> None:
    """Median and 99th percentile against the queue's length, a line per policy."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for axis, key, title in zip(
        axes, ("median_us", "p99_us"), ("median", "99th percentile"), strict=True
    ):
        for policy in dict.fromkeys(row.policy for row in rows):
            own = [row for row in rows if row.policy == policy]
            style = "o-" if policy == CHECKED else "o:"
            axis.plot(
                [r.n_waiting for r in own], [getattr(r, key) for r in own], style, label=policy
            )
        axis.plot(list(BUDGETS_US), list(BUDGETS_US.values()), "k_", markersize=18, label="budget")
        axis.set(xscale="log", yscale="log", xlabel="requests waiting", title=title)
    axes[0].set_ylabel("us of processor time per decision")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def report(rows: list[Row], load: list[float]) -> str:
    """The table as Markdown, and how it was made."""
    lines = [
        "# What a request-level decision costs",
        "",
        "`python -m benchmark.micro.scheduler --help` says what a decision is. Microseconds of the",
        f"thread's processor time on one of {os.cpu_count()} cores ({platform.machine()}), Python",
        f"{platform.python_version()}, SGLang {version('sglang')}; load averages at the end:",
        f"{', '.join(map(str, load))}: other work ran beside it.",
        f"Budgets of {CHECKED}, 99th percentile: 1,000 us at 1,000 waiting, 5,000 us at 10,000.",
        f"Those who wait are calls of {N_PROGRAMS:,} programs of {N_TENANTS} tenants.",
        f"Names with {PREFIX} are SGLang's own code, one `calc_priority`; the others are ours.",
        "Above 128 waiting its lpm and hrrn do not sort, nor does our lpm: they are fcfs, whose",
        "longest decisions are those in which it keeps the prefixes of 128 who wait fresh.",
        "",
        "| policy | waiting | decisions | median | p99 | longest | first plan after all arrived |",
        "|" + " --- |" * 7,
    ]
    for row in rows:
        times = (row.median_us, row.p99_us, row.longest_us, row.burst_us)
        counts = [f"{row.n_waiting:,}", f"{row.n_decisions:,}"]
        cells = [row.policy, *counts, *(f"{us:,.0f}" for us in times)]
        lines.append(f"| {' | '.join(cells)} |")
    command = "    python -m benchmark.micro.scheduler --out benchmark/results --policies \\"
    policies = f"        {','.join(dict.fromkeys(row.policy for row in rows))}"
    return "\n".join([*lines, "", "![cost](scheduler_cost.png)", "", command, policies, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policies", default="slack,fcfs,lpm,dfs-weight,hrrn,k-lpm,edf,niyama")
    parser.add_argument("--decisions", type=int, default=300, help="per row (default 300)")
    parser.add_argument("--check", action="store_true", help="status 1 if a budget is broken")
    parser.add_argument("--out", type=Path, help="write scheduler_cost.json, .md and .png there")
    options = parser.parse_args()
    print(f"{'policy':<30}{'waiting':>8}{'median':>12}{'p99':>12}{'longest':>12}{'burst':>12}")
    rows: list[Row] = []
    todo = [(policy, n) for policy in options.policies.split(",") for n in QUEUES]
    for policy, n_waiting in tqdm(todo, unit=" rows", leave=False):
        rows.append(measure(policy, n_waiting, options.decisions))
        tqdm.write(str(rows[-1]))
    if options.out is not None:
        load = [round(value, 2) for value in os.getloadavg()]
        about = {"machine": platform.machine(), "cpus": os.cpu_count(), "load_average": load}
        figures = {**about, "rows": [asdict(row) for row in rows]}
        (options.out / "scheduler_cost.json").write_text(json.dumps(figures, indent=1) + "\n")
        plot(rows, options.out / "scheduler_cost.png")
        (options.out / "scheduler_cost.md").write_text(report(rows, load))
    over = [
        row
        for row in rows
        if row.policy == CHECKED and row.p99_us > BUDGETS_US.get(row.n_waiting, 1e9)
    ]
    if options.check and over:
        sys.exit("Over budget:\n" + "\n".join(str(row) for row in over))


if __name__ == "__main__":
    main()
