"""Orders of the waiting queue, under three loads, on the real server and in the simulator.

    python -m benchmark.simulation.orders --model-path MODEL

Needs what `python -m benchmark.simulation.agreement` measured of the server and of this machine
(`benchmark/results/simulator_agreement_server.json`, or `--measured FILE`). Starts the server once
per policy, replays every load on it, simulates the same, prints both side by side and writes
`benchmark/results/request_orders.{md,json}`. About four minutes per policy on two cores, on which
nothing else should run. Run it in the root of the repository.

The workload: questions on six documents, Poisson arrivals. Load 1 is the rate at which arrivals
take all of the server's time in the order of arrival, as simulated. 60% of the requests are
interactive, 30% standard, 10% batch; their objectives are multiples of what prefilling a whole
prompt takes. Policies get them as `slo`. Nothing is loaded from the host: what differs is the order
alone.

A shared machine changes its speed. So before each replay reference passes say how fast it is now
(`pace.py`); arrivals and objectives are scaled by that, the simulated passes by what was found
before and after, and times are given in prefills of a whole prompt.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from benchmark.replay.records import Record
from benchmark.simulation.agreement import policy_args, replay_on, settings_for
from benchmark.simulation.pace import ROOT, Pace, PaceMaker, at_pace, between, servers_up
from tqdm import tqdm

from tiered_kv.api.slo import SloClass
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.live import RequestRecord
from tiered_kv.simulation.measured_server import MeasuredServer, read_measured_server
from tiered_kv.simulation.statistics import meets_slo
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.request import RecordedWorkload, Request
from tiered_kv.simulation.workload.slo_mix import SloMix

POLICIES = ("slack", "fcfs", "lpm", "hrrn", "k-lpm")
LOADS = (0.8, 1.0, 1.2)
SEED = 5
QUESTIONS = (
    "rag,requests={n},documents=6,zipf=1.0,retrieved=1,document_tokens=384,system_tokens=64,"
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


def whole_prefill_s(server: MeasuredServer) -> float:
    """Seconds that the median prompt takes alone, with nothing cached."""
    requests = list(open_workload(QUESTIONS.format(n=20), SEED).initial())
    n_tokens = int(statistics.median(request.input_tokens for request in requests))
    alone = [replace(requests[0], input_tokens=n_tokens)]
    result = Simulation(_recorded(alone), settings_for(server, "fcfs")).run()
    return result.records[0].ttft_s or 0.0


def workload(server: MeasuredServer, n_requests: int, load: float) -> RecordedWorkload:
    """The same requests in the same order whatever the load, closer together the higher it is."""
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
    return _recorded(adapted)


def _recorded(requests: Sequence[Request]) -> RecordedWorkload:
    return RecordedWorkload("questions", 64, list(requests))


def _busy_s(server: MeasuredServer, requests: Sequence[Request]) -> float:
    """Seconds of the server's time per request, if all come at once and go in their order."""
    result = Simulation(_recorded(requests), settings_for(server, "fcfs")).run()
    return result.busy_s / len(requests)


def outcome_of(
    met: Sequence[tuple[str, bool]],
    ttfts_s: Sequence[float],
    hit_tokens: int,
    span_s: float,
    unit_s: float,
) -> Outcome:
    """met: class, and whether it was in time, of each request."""
    ttfts = np.array(ttfts_s) / unit_s
    by_class = {
        name: statistics.fmean(is_met for of, is_met in met if of == name)
        for name in sorted({name for name, _ in met})
    }
    n_met = sum(is_met for _, is_met in met)
    return Outcome(
        n_met / len(met),
        by_class,
        n_met / span_s * unit_s,
        float(ttfts.mean()),
        float(np.percentile(ttfts, 90)),
        float(np.percentile(ttfts, 99)),
        hit_tokens,
    )


def measured(records: Sequence[Record], unit_s: float) -> Outcome:
    """Raises RuntimeError if a request failed."""
    errors = [record.error for record in records if record.error]
    if errors:
        raise RuntimeError(f"{len(errors)} requests failed, the first: {errors[0]}")
    return outcome_of(
        [(record.slo_class, record.meets_slo) for record in records],
        [record.ttft_s for record in records if record.ttft_s is not None],
        sum(record.cached_tokens or 0 for record in records),
        max(record.sent_s + (record.e2e_s or 0.0) for record in records),
        unit_s,
    )


def simulated(server: MeasuredServer, policy: str, load: RecordedWorkload) -> Outcome:
    """What clients see besides passes and waiting is added to TTFT."""
    result = Simulation(load, settings_for(server, policy)).run()
    overhead_s = server.request_overhead_s

    def seen(record: RequestRecord) -> RequestRecord:
        first_s = record.first_token_s
        return replace(record, first_token_s=None if first_s is None else first_s + overhead_s)

    records = [seen(record) for record in result.records]
    return outcome_of(
        [(record.slo_class, meets_slo(record)) for record in records],
        [record.ttft_s for record in records if record.ttft_s is not None],
        sum(record.device_hit_tokens for record in records),
        result.end_s,
        whole_prefill_s(server),
    )


@dataclass(frozen=True)
class Pair:
    """One policy under one load on both, and the machine's pace meanwhile."""

    measured: Outcome
    simulated: Outcome
    pace: Pace


def replay_all(
    model_path: Path,
    policy: str,
    server: MeasuredServer,
    loads: Sequence[float],
    n_requests: int,
    logs: Path,
) -> list[Pair]:
    """One server, all loads, each from an empty cache; and the same simulated."""
    found = []
    with servers_up(model_path, {policy: policy_args(policy)}, logs) as up:
        real = up[policy]
        pace_maker = PaceMaker(real.url, server)
        before = pace_maker.measure()
        for load in loads:
            asked = workload(at_pace(server, before), n_requests, load)
            real.flush_cache()
            with tqdm(total=len(asked), unit=" requests", desc=f"{policy} {load:g}") as bar:
                replayed = replay_on(
                    real.url, model_path, asked, partial(_advance, bar), send_slo=True
                )
                records = asyncio.run(replayed)
            after = pace_maker.measure()
            pace = between(before, after)
            paced = at_pace(server, pace)
            real_outcome = measured(records, whole_prefill_s(paced))
            found.append(Pair(real_outcome, simulated(paced, policy, asked), pace))
            before = after
    return found


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
            str(pair.pace),
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
        f"per load; {objectives}. Pace: reference prefills / decodes against the calibration."
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
    found: dict[float, dict[str, Pair]] = {load: {} for load in options.loads}
    for policy in options.policies:
        pairs = replay_all(
            options.model_path, policy, server, options.loads, options.requests, logs
        )
        for load, pair in zip(options.loads, pairs, strict=True):
            found[load][policy] = pair
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
        # After every policy: an hour's work shouldn't be lost to a Ctrl-C.
        options.output.with_suffix(".md").write_text(text)
        options.output.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"{text}\n{(time.monotonic() - began) / 60:.1f} minutes; written: {options.output}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
