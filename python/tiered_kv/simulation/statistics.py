"""What a simulation showed, in figures: latencies, objectives met, hits per tier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tiered_kv.api.slo import objectives_met
from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation.engine import SimulationResult
from tiered_kv.simulation.live import RequestRecord

TBT_CRITERIA: dict[str, Callable[[RequestRecord], float | None]] = {
    "mean": lambda record: record.mean_tbt_s,
    "p99": lambda record: record.p99_tbt_s,
    "max": lambda record: record.max_tbt_s,
}
"""Which time between a request's tokens is held against its objective."""

CDF_SHARES = (
    *(percent / 100.0 for percent in range(100)),
    *(0.99 + step / 1000.0 for step in range(1, 10)),
    1.0,
)
"""Shares at which distributions are kept: every percent, and every tenth of one above 99."""


def meets_slo(record: RequestRecord, criterion: str = "mean") -> bool:
    """Whether it was answered, with TTFT and TBT within its objectives where it has any.

    Raises ConfigError for an unknown criterion.
    """
    if criterion not in TBT_CRITERIA:
        raise ConfigError(
            f"There is no TBT criterion {criterion!r}; the known ones are "
            f"{', '.join(TBT_CRITERIA)}."
        )
    if record.finish_s is None:
        return False
    ttft_s, tbt_s = record.ttft_s, TBT_CRITERIA[criterion](record)
    return objectives_met(
        ttft_s, tbt_s, ttft_objective_s=record.ttft_slo_s, tbt_objective_s=record.tbt_slo_s
    )


def summarize(
    result: SimulationResult, *, criterion: str = "mean", n_warm_up: int = 0
) -> dict[str, Any]:
    """The figures of one run as JSON values; see `schema.py` for their meaning.

    n_warm_up: so many requests, the first by arrival, are left out of them.
    """
    records = result.records[n_warm_up:]
    finished = [record for record in records if record.finish_s is not None]
    span_s = max(result.end_s, 1e-9)
    met = sum(meets_slo(record, criterion) for record in records)
    return {
        "n_requests": len(records),
        "n_finished": len(finished),
        "duration_s": result.end_s,
        "tbt_criterion": criterion,
        "attainment": met / len(records) if records else None,
        "goodput_rps": met / span_s,
        "throughput_rps": len(finished) / span_s,
        "output_tokens_per_s": sum(record.output_tokens for record in finished) / span_s,
        "classes": {name: _class_summary(group, criterion) for name, group in _classes(records)},
        "ttft_s": distribution(record.ttft_s for record in finished),
        "wait_s": distribution(_wait_s(record) for record in finished),
        "mean_tbt_s": distribution(record.mean_tbt_s for record in finished),
        "p99_tbt_s": distribution(record.p99_tbt_s for record in finished),
        "hits": hit_tokens(records),
        "programs": program_times(records),
        "retracted_share": sum(r.n_retractions > 0 for r in records) / max(1, len(records)),
        "n_retractions": result.n_retractions,
        "n_swaps": result.n_swaps,
        "n_iterations": result.n_iterations,
        "busy_share": result.busy_s / span_s,
        "prefill_tokens": result.processed_prefill_tokens,
        "links": {
            name: {"n_bytes": use.n_bytes, "busy_share": use.busy_s / span_s}
            for name, use in result.links.items()
        },
    }


def distribution(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, usual quantiles and the whole curve at `CDF_SHARES`; None where there is no value."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known):
        return {"n": 0, "mean": None, "p50": None, "p90": None, "p99": None, "max": None, "cdf": []}
    p50, p90, p99 = np.quantile(known, (0.5, 0.9, 0.99))
    return {
        "n": len(known),
        "mean": float(known.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(known.max()),
        "cdf": [float(value) for value in np.quantile(known, CDF_SHARES)],
    }


def without_curves(run: dict[str, Any]) -> dict[str, Any]:
    """A summary without the curves of its distributions, for results that are not plotted."""
    names = ("ttft_s", "wait_s", "mean_tbt_s", "p99_tbt_s")
    return {**run, **{name: _without_curve(run[name]) for name in names}}


def _without_curve(figures: dict[str, Any]) -> dict[str, Any]:
    """A distribution per class and run would be most of a result file."""
    return {**figures, "cdf": []}


def hit_tokens(records: Sequence[RequestRecord]) -> dict[str, int]:
    """Prompt tokens by where their KV came from, over all requests that were admitted."""
    admitted = [record for record in records if record.admitted_s is not None]
    tiers = {
        "device": sum(record.device_hit_tokens for record in admitted),
        "host": sum(record.host_hit_tokens for record in admitted),
        "disk": sum(record.disk_hit_tokens for record in admitted),
    }
    if shared := sum(record.shared_hit_tokens for record in admitted):
        tiers["shared"] = shared
    total = sum(record.input_tokens for record in admitted)
    return {**tiers, "computed": total - sum(tiers.values()), "input": total}


def program_times(records: Sequence[RequestRecord]) -> dict[str, Any]:
    """Of sessions of several calls: how long they took, and how long their callers waited for us.

    `completion_s`: first arrival to last answer, pauses between calls included; `waited_s`: calls'
    times from arrival to answer, together; `attainment`: the share of those with an objective that
    met it. A session that was refused a call is in none of them.
    """
    calls: dict[int, list[RequestRecord]] = {}
    for record in records:
        if record.session is not None:
            calls.setdefault(record.session, []).append(record)
    completion, waited, in_time = [], [], []
    for of_one in calls.values():
        ends = [record.finish_s for record in of_one if record.finish_s is not None]
        if len(of_one) == 1 or len(ends) < len(of_one):
            continue
        completion.append(max(ends) - min(record.arrival_s for record in of_one))
        waited.append(sum(ends) - sum(record.arrival_s for record in of_one))
        if (task_slo_s := of_one[0].task_slo_s) is not None:
            in_time.append(completion[-1] <= task_slo_s)
    return {
        "attainment": sum(in_time) / len(in_time) if in_time else None,
        "completion_s": _without_curve(distribution(completion)),
        "waited_s": _without_curve(distribution(waited)),
    }


def _classes(records: Sequence[RequestRecord]) -> list[tuple[str, list[RequestRecord]]]:
    groups: dict[str, list[RequestRecord]] = {}
    for record in records:
        groups.setdefault(record.slo_class, []).append(record)
    return sorted(groups.items())


def _class_summary(records: list[RequestRecord], criterion: str) -> dict[str, Any]:
    ttft = [record.ttft_s for record in records]
    on_time = [
        ttft_s is not None and (record.ttft_slo_s is None or ttft_s <= record.ttft_slo_s)
        for record, ttft_s in zip(records, ttft, strict=True)
    ]
    return {
        "n_requests": len(records),
        "ttft_slo_s": records[0].ttft_slo_s,
        "tbt_slo_s": records[0].tbt_slo_s,
        "attainment": sum(meets_slo(record, criterion) for record in records) / len(records),
        "ttft_attainment": sum(on_time) / len(records),
        "ttft_s": _without_curve(distribution(ttft)),
        "mean_tbt_s": _without_curve(distribution(record.mean_tbt_s for record in records)),
        "p99_tbt_s": _without_curve(distribution(record.p99_tbt_s for record in records)),
        "tbt_attainment": _tbt_attainment(records, criterion),
        "late_gap_share": sum(r.n_late_gaps for r in records)
        / max(1, sum(r.n_gaps for r in records)),
    }


def _tbt_attainment(records: Sequence[RequestRecord], criterion: str) -> float:
    """Share of those answered whose time between tokens met its objective, if they had one."""
    finished = [record for record in records if record.finish_s is not None]
    met = 0
    for record in finished:
        tbt_s = TBT_CRITERIA[criterion](record)
        met += record.tbt_slo_s is None or tbt_s is None or tbt_s <= record.tbt_slo_s
    return met / max(1, len(finished))


def _wait_s(record: RequestRecord) -> float | None:
    return None if record.admitted_s is None else record.admitted_s - record.arrival_s
