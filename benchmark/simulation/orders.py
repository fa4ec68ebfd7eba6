"""Orders of the waiting queue, under three loads, on the real server and in the simulator.

    python -m benchmark.simulation.orders --model-path MODEL

Needs what `python -m benchmark.simulation.agreement` measured of the server and of this machine
(`benchmark/results/simulator_agreement_server.json`, or `--measured FILE`). Starts one server per
policy, replays every load on each of them, simulates the same, prints both side by side and writes
`benchmark/results/request_orders.{md,json}`. About 30 minutes on two cores, on which nothing else
should run, and 3.2 GB of memory per policy. Run it in the root of the repository.

The workload: questions on twelve documents, Poisson arrivals; the device's pool holds four to eight
requests, or two thirds of the documents. Load 1 is the rate at which arrivals take all of the
server's time in the order of arrival, as simulated. 60% of the requests are interactive, 30%
standard, 10% batch; their objectives are multiples of what prefilling a whole prompt takes.
Policies get them as `slo`. Nothing is loaded from the host: what differs is the order alone.

A shared machine changes its speed. So all servers are up and one works: a load is cut into waves,
which the policies take in turn, each wave from an empty cache. Before all of them take it reference
passes say how fast the machine is now (`pace.py`); arrivals and objectives are scaled by that,
alike for all policies. The simulator's passes are scaled by what the wave's own passes took
(`own_passes.py`), and times are given in prefills of a whole prompt at that pace.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.replay.records import Record
from benchmark.simulation.agreement import policy_args, replay_on
from benchmark.simulation.orders_load import (
    N_WAVES,
    POOL_TOKENS,
    simulate,
    whole_prefill_s,
    workload,
)
from benchmark.simulation.orders_report import Pair, Wave, outcome_of, report
from benchmark.simulation.own_passes import own_pace, read_passes
from benchmark.simulation.pace import PaceMaker, at_pace, median, warm_servers
from tiered_kv.simulation.live import RequestRecord
from tiered_kv.simulation.measured_server import MeasuredServer, read_measured_server
from tiered_kv.simulation.statistics import meets_slo
from tiered_kv.simulation.workload.request import RecordedWorkload

POLICIES = ("slack", "fcfs", "lpm", "hrrn", "k-lpm")
LOADS = (0.8, 1.0, 1.2)
#: Reference passes before a wave run on so many servers; the median counts.
PACERS = 3


def measured(records: Sequence[Record], unit_s: float) -> Wave:
    """Raises RuntimeError if a request failed."""
    errors = [record.error for record in records if record.error]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first: {errors[0]}")
    return Wave(
        [(record.slo_class, record.meets_slo) for record in records],
        [record.ttft_s for record in records if record.ttft_s is not None],
        sum(record.cached_tokens or 0 for record in records),
        max(record.sent_s + (record.e2e_s or 0.0) for record in records),
        unit_s,
    )


def simulated(server: MeasuredServer, policy: str, load: RecordedWorkload) -> Wave:
    """What clients see besides passes and waiting is added to TTFT."""
    result = simulate(server, policy, load)
    overhead_s = server.request_overhead_s

    def seen(record: RequestRecord) -> RequestRecord:
        first_s = record.first_token_s
        return replace(record, first_token_s=None if first_s is None else first_s + overhead_s)

    records = [seen(record) for record in result.records]
    return Wave(
        [(record.slo_class, meets_slo(record)) for record in records],
        [record.ttft_s for record in records if record.ttft_s is not None],
        sum(record.device_hit_tokens for record in records),
        result.end_s,
        whole_prefill_s(server),
    )


@dataclass(frozen=True)
class Turn:
    """One wave on one server; times of `time.perf_counter`."""

    asked: RecordedWorkload
    records: list[Record]
    start_s: float
    end_s: float


def replay_wave(url: str, model_path: Path, asked: RecordedWorkload, bar: tqdm[None]) -> Turn:
    start_s = time.perf_counter()
    replayed = replay_on(url, model_path, asked, partial(_advance, bar), send_slo=True)
    records = asyncio.run(replayed)
    return Turn(asked, records, start_s, time.perf_counter())


def replay_all(
    model_path: Path,
    traces: Mapping[str, Path],
    server: MeasuredServer,
    loads: Sequence[float],
    n_requests: int,
    logs: Path,
) -> dict[float, dict[str, list[Turn]]]:
    """By load and policy, whose server writes its timeline to what `traces` says."""
    args_of = {
        policy: [*policy_args(policy, POOL_TOKENS), "--tiered-kv-trace-file", str(trace)]
        for policy, trace in traces.items()
    }
    found: dict[float, dict[str, list[Turn]]] = {load: {p: [] for p in traces} for load in loads}
    per_wave = -(-n_requests // N_WAVES)
    total = len(loads) * len(traces) * n_requests
    with warm_servers(model_path, args_of, logs) as up, tqdm(total=total, unit=" requests") as bar:
        pace_makers = {policy: PaceMaker(real.url, server) for policy, real in up.items()}
        for start in range(0, n_requests, per_wave):
            for load in loads:
                # The order of the policies goes round, so that none always has the same neighbour.
                order = _rotated(list(up), by=loads.index(load) + start // per_wave)
                # Once for all: a slow moment before one's turn must not give it more time.
                pace = median([pace_makers[p].measure(repeats=1) for p in order[:PACERS]])
                part = slice(start, start + per_wave)
                asked = workload(at_pace(server, pace), n_requests, load, part)
                for policy in order:
                    bar.set_description(f"{policy} {load:g}")
                    up[policy].flush_cache()
                    turn = replay_wave(up[policy].url, model_path, asked, bar)
                    found[load][policy].append(turn)
    return found


def _rotated(names: list[str], by: int) -> list[str]:
    at = by % len(names)
    return names[at:] + names[:at]


def compare(
    turns: dict[float, dict[str, list[Turn]]], traces: Mapping[str, Path], server: MeasuredServer
) -> dict[float, dict[str, Pair]]:
    """Every wave at the pace of its own passes, on the server and simulated."""
    passes = {policy: read_passes(trace) for policy, trace in traces.items()}

    def pair(policy: str, waves: Sequence[Turn]) -> Pair:
        paces = [own_pace(passes[policy], w.start_s, w.end_s, server.times) for w in waves]
        paced = [at_pace(server, pace) for pace in paces]
        real = [measured(w.records, whole_prefill_s(p)) for w, p in zip(waves, paced, strict=True)]
        model = [simulated(p, policy, w.asked) for w, p in zip(waves, paced, strict=True)]
        return Pair(outcome_of(real), outcome_of(model), tuple(paces))

    return {
        load: {policy: pair(policy, waves) for policy, waves in by_policy.items()}
        for load, by_policy in turns.items()
    }


def _advance(bar: tqdm[None], _record: Record) -> None:
    bar.update()


def main() -> int:
    """Run, print and write."""
    parser = parser_of("benchmark.simulation.orders", __doc__)
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="folder of the demo model")
    add("--measured", type=Path, default=RESULTS / "simulator_agreement_server.json",
        help="what was measured of the server (default: %(default)s)")  # fmt: skip
    add("--policies", nargs="+", default=list(POLICIES), metavar="NAME")
    add("--loads", nargs="+", type=float, default=list(LOADS), metavar="X")
    add("--requests", type=int, default=60, help="per load (default: 60)")
    add("--output", type=Path, default=RESULTS / "request_orders",
        help="path of the results without suffix (default: %(default)s)")  # fmt: skip
    options = parser.parse_args()
    server = read_measured_server(options.measured)
    logs = Path(tempfile.mkdtemp(prefix="tiered_kv_orders_"))
    print(f"logs: {logs}", file=sys.stderr)
    began = time.monotonic()
    traces = {policy: logs / f"{policy}_trace.json" for policy in options.policies}
    turns = replay_all(options.model_path, traces, server, options.loads, options.requests, logs)
    found = compare(turns, traces, server)
    unit_s = whole_prefill_s(server)
    text = report(found, unit_s, options.requests)
    document: dict[str, Any] = {
        "unit_s": unit_s,
        "requests": options.requests,
        "loads": {
            f"{load:g}": {name: asdict(pair) for name, pair in pairs.items()}
            for load, pairs in found.items()
        },
    }
    options.output.with_suffix(".md").write_text(text)
    options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{text}\n{(time.monotonic() - began) / 60:.1f} minutes; written: {options.output}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
