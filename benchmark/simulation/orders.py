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

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from benchmark.replay.records import Record
from benchmark.simulation.agreement import policy_args, replay_on, settings_for
from benchmark.simulation.own_passes import own_pace, read_passes
from benchmark.simulation.pace import ROOT, Pace, PaceMaker, at_pace, median, servers_up
from tqdm import tqdm

from tiered_kv.api.slo import SloClass
from tiered_kv.simulation.engine import Simulation, SimulationResult
from tiered_kv.simulation.live import RequestRecord
from tiered_kv.simulation.measured_server import MeasuredServer, read_measured_server
from tiered_kv.simulation.statistics import meets_slo
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.request import RecordedWorkload, Request
from tiered_kv.simulation.workload.slo_mix import SloMix

POLICIES = ("slack", "fcfs", "lpm", "hrrn", "k-lpm")
LOADS = (0.8, 1.0, 1.2)
N_WAVES = 2
#: Reference passes before a wave run on so many servers; the median counts.
PACERS = 3
SEED = 5
POOL_TOKENS = 4096
QUESTIONS = (
    "rag,requests={n},documents=12,zipf=1.0,retrieved=1,document_tokens=384,system_tokens=64,"
    "question_tokens=48,output_tokens=6,block_tokens=64,arrivals=at-once"
)
#: (class, share, TTFT and mean TBT objectives as multiples of prefilling a whole prompt).
OBJECTIVES = (
    ("interactive", 0.6, 2.0, 1.0),
    ("standard", 0.3, 8.0, 2.0),
    ("batch", 0.1, 120.0, None),
)
#: Shares of requests in time that differ by less than this have no order to get right.
TIE = 0.05


@dataclass(frozen=True)
class Wave:
    """What one policy made of one wave, on the server or simulated."""

    met: Sequence[tuple[str, bool]]
    """Class, and whether it was in time, of each request."""
    ttfts_s: Sequence[float]
    hit_tokens: int
    span_s: float
    unit_s: float
    """What prefilling a whole prompt took then."""


@dataclass(frozen=True)
class Outcome:
    """Of one policy under one load, on the server or simulated.

    The unit of time is what prefilling a whole prompt takes at the machine's pace then.
    """

    in_time: float
    """Share of the requests that met their objectives."""
    in_time_by_class: dict[str, float]
    goodput: float
    """Requests in time per unit of time."""
    ttft_mean: float
    ttft_p90: float
    ttft_p99: float
    hit_tokens: int


def _simulate(server: MeasuredServer, policy: str, load: RecordedWorkload) -> SimulationResult:
    return Simulation(load, settings_for(server, policy, POOL_TOKENS)).run()


def whole_prefill_s(server: MeasuredServer) -> float:
    """Seconds that the median prompt takes alone, with nothing cached."""
    requests = list(open_workload(QUESTIONS.format(n=20), SEED).initial())
    n_tokens = int(statistics.median(request.input_tokens for request in requests))
    alone = [replace(requests[0], input_tokens=n_tokens)]
    result = _simulate(server, "fcfs", _recorded(alone))
    return result.records[0].ttft_s or 0.0


def workload(
    server: MeasuredServer, n_requests: int, load: float, part: slice = slice(None)
) -> RecordedWorkload:
    """The same requests in the same order whatever the load, closer together the higher it is.

    part: of the requests, the first of which arrives when its gap is over.
    """
    unit_s = whole_prefill_s(server)
    classes = tuple(
        SloClass(name, ttft * unit_s, None if tbt is None else tbt * unit_s)
        for name, _, ttft, tbt in OBJECTIVES
    )
    mix = SloMix(classes, tuple(share for _, share, _, _ in OBJECTIVES))
    requests = list(open_workload(QUESTIONS.format(n=n_requests), SEED).initial())
    gaps = np.random.default_rng(SEED).exponential(1.0, len(requests))
    arrivals_s = np.cumsum(gaps) * _busy_s(server, requests) / load
    adapted = []
    for request, arrival_s in zip(requests, arrivals_s, strict=True):
        slo = mix.assign(request, SEED)
        adapted.append(
            replace(
                request,
                arrival_s=float(arrival_s),
                slo_class=slo.name,
                ttft_slo_s=slo.ttft_s,
                tbt_slo_s=slo.tbt_s,
            )
        )
    start = part.indices(n_requests)[0]
    before_s = float(arrivals_s[start - 1]) if start else 0.0
    return _recorded([replace(r, arrival_s=r.arrival_s - before_s) for r in adapted[part]])


def _recorded(requests: Sequence[Request]) -> RecordedWorkload:
    return RecordedWorkload("questions", 64, list(requests))


def _busy_s(server: MeasuredServer, requests: Sequence[Request]) -> float:
    """Seconds of the server's time per request, if all come at once and go in their order."""
    result = _simulate(server, "fcfs", _recorded(requests))
    return result.busy_s / len(requests)


def outcome_of(waves: Sequence[Wave]) -> Outcome:
    """All waves of a load together, each in its own unit of time."""
    met = [one for wave in waves for one in wave.met]
    ttfts = np.array([ttft_s / wave.unit_s for wave in waves for ttft_s in wave.ttfts_s])
    by_class = {
        name: statistics.fmean(is_met for of, is_met in met if of == name)
        for name in sorted({name for name, _ in met})
    }
    n_met = sum(is_met for _, is_met in met)
    return Outcome(
        n_met / len(met),
        by_class,
        n_met / sum(wave.span_s / wave.unit_s for wave in waves),
        float(ttfts.mean()),
        float(np.percentile(ttfts, 90)),
        float(np.percentile(ttfts, 99)),
        sum(wave.hit_tokens for wave in waves),
    )


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
    result = _simulate(server, policy, load)
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
class Pair:
    """One policy under one load on both, and the machine's pace meanwhile, wave by wave."""

    measured: Outcome
    simulated: Outcome
    paces: tuple[Pace, ...]


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
    with servers_up(model_path, args_of, logs) as up, tqdm(total=total, unit=" requests") as bar:
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


def disagreements(real: dict[str, Outcome], model: dict[str, Outcome]) -> list[str]:
    """Pairs of policies that the simulator ranks otherwise by requests in time; ties left out."""
    wrong = []
    for one, other in combinations(real, 2):
        apart = real[one].in_time - real[other].in_time
        if abs(apart) > TIE and apart * (model[one].in_time - model[other].in_time) < 0:
            wrong.append(f"{one} and {other}")
    return wrong


def table(pairs: dict[str, Pair]) -> str:
    """One load, in Markdown: measured, and simulated in brackets."""
    columns = "policy, in time, interactive, standard, batch, goodput, TTFT mean, p90, p99"
    heads = [*columns.split(", "), "hit tokens", "violations / fcfs's", "goodput / fcfs's", "pace"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    fcfs = pairs["fcfs"].measured if "fcfs" in pairs else None
    for name, pair in pairs.items():
        a, b = pair.measured, pair.simulated
        classes = (
            f"{a.in_time_by_class[c]:.0%} ({b.in_time_by_class[c]:.0%})" for c, *_ in OBJECTIVES
        )
        late_ratio = (
            f"{(1 - a.in_time) / (1 - fcfs.in_time):.2f}" if fcfs and fcfs.in_time < 1 else "-"
        )
        cells = [
            f"{a.in_time:.0%} ({b.in_time:.0%})",
            *classes,
            f"{a.goodput:.2f} ({b.goodput:.2f})",
            f"{a.ttft_mean:.1f} ({b.ttft_mean:.1f})",
            f"{a.ttft_p90:.1f} ({b.ttft_p90:.1f})",
            f"{a.ttft_p99:.1f} ({b.ttft_p99:.1f})",
            f"{a.hit_tokens:,} ({b.hit_tokens:,})",
            late_ratio,
            f"{a.goodput / fcfs.goodput:.2f}" if fcfs and fcfs.goodput else "-",
            "; ".join(map(str, pair.paces)),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(found: dict[float, dict[str, Pair]], unit_s: float, n_requests: int) -> str:
    """All loads, in Markdown."""
    objectives = "; ".join(
        f"{name} {share:.0%}: first token in {ttft:g}"
        + ("" if tbt is None else f", {tbt:g} between tokens")
        for name, share, ttft, tbt in OBJECTIVES
    )
    about = (
        "Made by `python -m benchmark.simulation.orders`: the real server on two cores without a "
        "GPU, and in brackets the simulator. The unit of time is the prefill of a whole prompt at "
        f"the machine's pace then ({unit_s:.2f} s when it was calibrated). {n_requests} requests "
        f"per load in {N_WAVES} waves, which the policies take in turn; a pool of {POOL_TOKENS:,} "
        f"tokens; {objectives}. Pace: a wave's own prefills / decodes against the calibration."
    )
    parts = ["# Orders of the waiting queue on the real server", about]
    for load, pairs in found.items():
        wrong = disagreements(
            {name: pair.measured for name, pair in pairs.items()},
            {name: pair.simulated for name, pair in pairs.items()},
        )
        verdict = (
            "The simulator ranks all pairs as the server does"
            if not wrong
            else f"The simulator ranks otherwise: {', '.join(wrong)}"
        )
        parts.append(
            f"## Load {load:g}\n\n{table(pairs)}\n\n{verdict} (by requests in time; pairs "
            f"less than {TIE:.0%} apart left out)."
        )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """Run, print and write."""
    about = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.simulation.orders",
        description=about[0],
        epilog="\n\n".join(about[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results = ROOT / "benchmark" / "results"
    add = parser.add_argument
    add("--model-path", type=Path, required=True, help="folder of the demo model")
    add("--measured", type=Path, default=results / "simulator_agreement_server.json",
        help="what was measured of the server (default: %(default)s)")  # fmt: skip
    add("--policies", nargs="+", default=list(POLICIES), metavar="NAME")
    add("--loads", nargs="+", type=float, default=list(LOADS), metavar="X")
    add("--requests", type=int, default=60, help="per load (default: 60)")
    add("--output", type=Path, default=results / "request_orders",
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
