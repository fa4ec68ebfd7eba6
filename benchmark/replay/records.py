"""What happened to each request, and what that sums up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tiered_kv.api.slo import objectives_met
from tiered_kv.scheduler.cost_model import CostModel

SCHEMA = 1
"""Version of the JSON that the command writes."""


@dataclass(slots=True)
class Record:
    """One request as the client saw it. Times are seconds after the replay's start."""

    request_id: int
    session: int | None
    slo_class: str
    ttft_slo_s: float | None
    tbt_slo_s: float | None
    scheduled_s: float
    """When the workload wanted it sent."""
    sent_s: float
    input_tokens: int
    """Tokens that the workload asked for."""
    ttft_s: float | None = None
    """To the first text; None if the request failed."""
    e2e_s: float | None = None
    """To the last."""
    gaps_s: list[float] = field(default_factory=list)
    """Between pieces of text; servers may put several tokens in one."""
    prompt_tokens: int | None = None
    """As the server counted them."""
    output_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens that the server didn't compute; None if it doesn't tell."""
    cached_by_tier: dict[str, int] = field(default_factory=dict)
    """The same by tier, where the server tells."""
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per output token after the first; None with a single token."""
        n_output = self.output_tokens or 0
        if self.ttft_s is None or self.e2e_s is None or n_output < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (n_output - 1)

    @property
    def meets_slo(self) -> bool:
        """Answered, first token in time, and the others in time on average."""
        if self.error is not None or self.ttft_s is None:
            return False
        return objectives_met(
            self.ttft_s,
            self.tpot_s,
            ttft_objective_s=self.ttft_slo_s,
            tbt_objective_s=self.tbt_slo_s,
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """A request's work by the cost model, whatever server did it."""

    prefill_token_equivalents: float
    idealized_s: float


def request_cost(cost: CostModel, record: Record) -> Cost | None:
    """The work of an answered request; None if the server didn't say what it did.

    Prefill token equivalents (PTE) as arXiv 2604.05404 defines them in section 3.2, of one turn:
    D_prefill + gamma * L_seq * D_decode, with D_decode the output tokens and L_seq the context
    before the first of them. D_prefill is what the server computed: the paper, for which caches
    are lost between turns, counts the whole prompt. gamma (section 3.3) is the time to read a
    token's KV over the time to compute a token, at the rates that the device reaches rather than
    its peaks. Idealized runtime, after Narayanan et al. (NeurIPS 2023): the seconds that the whole
    request takes alone on the device, nothing cached.
    """
    if record.prompt_tokens is None or not record.output_tokens:
        return None
    n_prompt, n_output = record.prompt_tokens, record.output_tokens
    model, device = cost.model, cost.device
    read_s = model.kv_bytes_per_token / (device.memory_bandwidth * device.bandwidth_efficiency)
    compute_s = 2.0 * model.n_active_parameters / (device.flops * device.compute_efficiency)
    # The first token comes from the prefill; the others each see all before them.
    n_decoded = n_output - 1
    middle = n_prompt + n_output // 2
    return Cost(
        n_prompt - (record.cached_tokens or 0) + read_s / compute_s * n_prompt * n_output,
        cost.prefill_s(n_prompt) + n_decoded * cost.iteration_s([], middle, 1),
    )


def summarise(records: Sequence[Record], cost: CostModel | None = None) -> dict[str, Any]:
    """All figures of a replay, for JSON. Percentiles are over answered requests."""
    answered = [record for record in records if record.error is None]
    end_s = max((record.sent_s + (record.e2e_s or 0.0) for record in records), default=0.0)
    begin_s = min((record.sent_s for record in records), default=0.0)
    span_s = max(end_s - begin_s, 1e-9)
    n_output = sum(record.output_tokens or 0 for record in answered)
    told = [record for record in answered if record.cached_tokens is not None]
    n_told = sum(record.prompt_tokens or 0 for record in told)
    summary: dict[str, Any] = {
        "requests": len(records),
        "errors": len(records) - len(answered),
        "span_s": span_s,
        "requests_per_s": len(answered) / span_s,
        "prompt_tokens": sum(record.prompt_tokens or 0 for record in answered),
        "output_tokens": n_output,
        "output_tokens_per_s": n_output / span_s,
        "ttft_s": percentiles(record.ttft_s for record in answered),
        "tbt_s": percentiles(gap for record in answered for gap in record.gaps_s),
        "tpot_s": percentiles(record.tpot_s for record in answered),
        "e2e_s": percentiles(record.e2e_s for record in answered),
        "cached_tokens": sum(record.cached_tokens or 0 for record in told) if told else None,
        "cached_share": sum(r.cached_tokens or 0 for r in told) / n_told if n_told else None,
        "cached_by_tier": _by_tier(answered),
        "slo": _attainment(records, span_s),
        # A client that can't keep up measures itself.
        "late_s": percentiles(record.sent_s - record.scheduled_s for record in records),
        "wrong_lengths": sum(
            record.prompt_tokens is not None and record.prompt_tokens != record.input_tokens
            for record in answered
        ),
    }
    if cost is not None:
        summary["work"] = _work(cost, answered)
    return summary


def percentiles(values: Iterable[float | None]) -> dict[str, float] | None:
    """Mean and percentiles of the values that are there; None if none is."""
    found = np.array([value for value in values if value is not None])
    if not found.size:
        return None
    p50, p90, p99 = np.percentile(found, [50, 90, 99])
    return {
        "mean": float(found.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": float(found.max()),
    }


def _by_tier(records: Sequence[Record]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for record in records:
        for tier, tokens in record.cached_by_tier.items():
            totals[tier] = totals.get(tier, 0) + tokens
    return totals


def _attainment(records: Sequence[Record], span_s: float) -> dict[str, dict[str, float]]:
    """By class: requests, the share that met its targets, and how many did per second."""
    found = {}
    for name in sorted({record.slo_class for record in records}):
        of_class = [record for record in records if record.slo_class == name]
        met = sum(record.meets_slo for record in of_class)
        found[name] = {
            "requests": len(of_class),
            "attainment": met / len(of_class),
            "goodput_per_s": met / span_s,
        }
    return found


def _work(cost: CostModel, answered: Sequence[Record]) -> dict[str, Any]:
    pairs = [(record, request_cost(cost, record)) for record in answered]
    known = [(record, work) for record, work in pairs if work is not None]
    return {
        "model": cost.model.name,
        "device": cost.device.name,
        "prefill_token_equivalents": sum(work.prefill_token_equivalents for _, work in known),
        "idealized_s": percentiles(work.idealized_s for _, work in known),
        # Over 1: waiting, sharing the device, loading; under 1: cached prefixes.
        "e2e_over_idealized": percentiles(
            record.e2e_s / work.idealized_s for record, work in known if record.e2e_s is not None
        ),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for people, in Markdown."""
    lines = ["| | mean | p50 | p90 | p99 | max |", "|---|---:|---:|---:|---:|---:|"]
    for key, name in (
        ("ttft_s", "time to first token"),
        ("tbt_s", "time between pieces"),
        ("tpot_s", "time per output token"),
        ("e2e_s", "end to end"),
        ("late_s", "sent late by"),
    ):
        figures = summary[key]
        if figures is not None:
            cells = (_milliseconds(figures[part]) for part in ("mean", "p50", "p90", "p99", "max"))
            lines.append(f"| {name}, ms | {' | '.join(cells)} |")
    lines += ["", *_facts(summary)]
    return "\n".join(lines)


def _facts(summary: dict[str, Any]) -> list[str]:
    errors = summary["errors"]
    facts = [
        f"- {summary['requests']} requests in {summary['span_s']:.1f} s, {errors} failed",
        f"- {summary['output_tokens_per_s']:.1f} output tokens/s",
    ]
    if summary["cached_share"] is None:
        facts.append("- cached tokens: the server doesn't tell (SGLang: --enable-cache-report)")
    else:
        tiers = ", ".join(f"{tier} {n:,}" for tier, n in sorted(summary["cached_by_tier"].items()))
        facts.append(
            f"- cached: {summary['cached_tokens']:,} of {summary['prompt_tokens']:,} prompt tokens "
            f"({summary['cached_share']:.1%})" + (f"; by tier: {tiers}" if tiers else "")
        )
    facts += [
        f"- class {name}: {figures['attainment']:.1%} of {figures['requests']} within targets, "
        f"{figures['goodput_per_s']:.2f}/s"
        for name, figures in summary["slo"].items()
    ]
    if summary["wrong_lengths"]:
        facts.append(
            f"- {summary['wrong_lengths']} prompts had another length than the "
            "workload says (of a chat log it's an estimate)"
        )
    work = summary.get("work")
    if work and work["idealized_s"]:
        facts.append(
            f"- work as {work['model']} on {work['device']}: "
            f"{work['prefill_token_equivalents']:,.0f} prefill token equivalents; idealized "
            f"runtime {_milliseconds(work['idealized_s']['mean'])} ms on average, measured over "
            f"idealized {work['e2e_over_idealized']['p50']:.2f} in the median"
        )
    return facts


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f}"
