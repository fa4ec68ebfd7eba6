"""How much load a server takes, in two senses.

By work (`saturated_capacity`): the rate at which requests bring as much work per second as a server
does that always has someone waiting. Beyond it queues grow without bound, whatever the order.

By objectives (`best_capacity`): the highest rate at which objectives are still met. Some requests
miss theirs even alone (a long prompt and a short TTFT objective). So the share of requests that
meet theirs is compared with the most that any of the compared policies reaches on an unloaded
server, and capacity is the highest rate at which it is at least `KEPT_SHARE` of that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tiered_kv.core.errors import ConfigError
from tiered_kv.simulation.jobs import Job, run_job

KEPT_SHARE = 0.9
SATURATED_RATE = 100.0
"""Times the workload's own rate at which there is always someone waiting."""
UNLOADED_RATE = 0.02
"""Times the workload's own rate at which requests are as good as alone."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """Rates are multiples of the workload's own."""

    best: str
    """Name of the job with the highest capacity."""
    rate: float
    """That capacity."""
    target: float
    """Attainment that counted as sustained."""
    unloaded: dict[str, float]
    """Attainment of each job at `UNLOADED_RATE`."""
    trials: tuple[tuple[str, float, float], ...]
    """All (job, rate, attainment) that were simulated on the way."""


@dataclass(frozen=True, slots=True)
class Saturation:
    """Rates are multiples of the workload's own."""

    best: str
    """Name of the job with the highest capacity."""
    rate: float
    """That capacity."""
    rates: dict[str, float]
    """The capacity of each job."""


def saturated_capacity(
    jobs: Mapping[str, Job], *, progress: Callable[[str], None] = lambda _: None
) -> Saturation:
    """For each of `jobs`, the rate that would keep it busy all the time; one run each.

    The workload is sent at `SATURATED_RATE`, so that everyone queues, and the seconds of forward
    passes it takes are compared with those over which it arrives at its own rate. Raises
    ConfigError if it all arrives at once.
    """
    rates: dict[str, float] = {}
    for name, job in jobs.items():
        arrivals_s = [
            request.arrival_s
            for request in job.at_rate(1.0).workload.open(job.settings.costs().prefill_s).initial()
        ]
        span_s = max(arrivals_s, default=0.0)
        if span_s <= 0:
            raise ConfigError(
                "The workload arrives all at once, so there is no rate to scale; choose arrivals "
                "over time."
            )
        run = run_job(job.at_rate(SATURATED_RATE))
        rates[name] = span_s / (run["busy_share"] * run["duration_s"])
        progress(f"{name} is saturated at rate {rates[name]:.3g}")
    best = max(rates, key=lambda name: rates[name])
    return Saturation(best, rates[best], rates)


def best_capacity(
    jobs: Mapping[str, Job],
    *,
    low: float = UNLOADED_RATE,
    high: float = 100.0,
    tolerance: float = 0.03,
    progress: Callable[[str], None] = lambda _: None,
) -> Capacity:
    """The highest rate between `low` and `high` that any of `jobs` sustains, to `tolerance`.

    Most jobs need one run: one that fails at the best rate so far cannot be the best. The others
    go on by bisection, on the assumption that attainment falls with load. Raises ConfigError if
    even `low` is too much for all, or `high` for nobody.
    """
    trials: list[tuple[str, float, float]] = []

    def attainment(name: str, rate: float) -> float:
        share = float(run_job(jobs[name].at_rate(rate))["attainment"])
        trials.append((name, rate, share))
        progress(f"{name} at rate {rate:.3g}: {share:.1%} meet their objectives")
        return share

    unloaded = {name: attainment(name, UNLOADED_RATE) for name in jobs}
    target = KEPT_SHARE * max(unloaded.values())
    best, best_rate = "", low
    # Who does best alone is likely to do best under load: then the others fail at once.
    for name in sorted(jobs, key=lambda name: -unloaded[name]):
        lower, upper = best_rate, best_rate * (1.0 + tolerance)
        if unloaded[name] < target or attainment(name, upper) < target:
            continue
        best = name
        while True:
            lower, upper = upper, upper * 2.0
            if lower >= high:
                raise ConfigError(
                    f"{name} sustains even {lower:.3g} times the workload's rate; make the "
                    "workload heavier."
                )
            if attainment(name, upper) < target:
                break
        while upper / lower > 1.0 + tolerance:
            middle = (lower * upper) ** 0.5
            if attainment(name, middle) >= target:
                lower = middle
            else:
                upper = middle
        best_rate = lower
    if not best:
        raise ConfigError(
            f"At {low} times the workload's rate nobody keeps {KEPT_SHARE:.0%} of the unloaded "
            "attainment; slow the workload down."
        )
    return Capacity(best, best_rate, target, unloaded, tuple(trials))
