"""What is asked of every policy: questions on documents, under a load, with objectives."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from benchmark.simulation.agreement import settings_for
from tiered_kv.api.slo import SloClass
from tiered_kv.simulation.engine import Simulation, SimulationResult
from tiered_kv.simulation.measured_server import MeasuredServer
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.request import RecordedWorkload, Request
from tiered_kv.simulation.workload.slo_mix import SloMix

N_WAVES = 2
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


def simulate(server: MeasuredServer, policy: str, load: RecordedWorkload) -> SimulationResult:
    """`load` on a simulated server with that policy."""
    return Simulation(load, settings_for(server, policy, POOL_TOKENS)).run()


def whole_prefill_s(server: MeasuredServer) -> float:
    """Seconds that the median prompt takes alone, with nothing cached."""
    requests = list(open_workload(QUESTIONS.format(n=20), SEED).initial())
    n_tokens = int(statistics.median(request.input_tokens for request in requests))
    alone = [replace(requests[0], input_tokens=n_tokens)]
    result = simulate(server, "fcfs", _recorded(alone))
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
    result = simulate(server, "fcfs", _recorded(requests))
    return result.busy_s / len(requests)
