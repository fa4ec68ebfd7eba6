"""Simulations as values that can be sent to worker processes, and the runner of many."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

from tiered_kv.simulation.engine import Progress, Simulation
from tiered_kv.simulation.fine_pages import FinePages
from tiered_kv.simulation.first_turns import FirstTurns
from tiered_kv.simulation.settings import InstanceSettings
from tiered_kv.simulation.spread import SpreadWorkload
from tiered_kv.simulation.statistics import summarize
from tiered_kv.simulation.timeline import Timeline
from tiered_kv.simulation.workload.adapt import Adaptation, AdaptedWorkload
from tiered_kv.simulation.workload.catalog import open_workload
from tiered_kv.simulation.workload.request import Workload
from tiered_kv.simulation.workload.slo_mix import UnloadedPrefill, parse_slo_mix


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadChoice:
    """A workload by name or path, and what to change in it; see `workload.catalog`."""

    spec: str
    rate: float = 1.0
    length: Fraction = Fraction(1)
    pause: float = 1.0
    limit: int | None = None
    spread_s: float = 0.0
    """See `spread.py`; 3 for Mooncake's traces."""
    turns: int | None = None
    """Only so many calls of each session."""
    page_tokens: int | None = None
    """Blocks are cut into pages of so many tokens; see `fine_pages.py`."""
    slo_mix: str | None = None
    seed: int = 0

    def open(self, unloaded_s: UnloadedPrefill | None = None) -> Workload:
        """The workload; unloaded_s: of whom it is for, where objectives scale with the prompt.

        Raises WorkloadError.
        """
        adaptation = Adaptation(
            rate=self.rate,
            length=self.length,
            pause=self.pause,
            limit=self.limit,
            slo_mix=parse_slo_mix(self.slo_mix) if self.slo_mix else None,
            seed=self.seed,
        )
        workload = _open(self.spec, self.seed)
        if self.spread_s:
            workload = SpreadWorkload(workload, self.spread_s, self.seed)
        if self.turns is not None:
            workload = FirstTurns(workload, self.turns)
        if self.page_tokens is not None:
            workload = FinePages(workload, self.page_tokens)
        return AdaptedWorkload(workload, adaptation, unloaded_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One simulation."""

    workload: WorkloadChoice
    settings: InstanceSettings
    seed: int = 0
    criterion: str = "mean"
    n_warm_up: int = 0
    """So many requests, the first by arrival, count in nothing but the load."""
    labels: dict[str, Any] = field(default_factory=dict)
    """What distinguishes it in a sweep; copied to the result."""

    def at_rate(self, rate: float) -> Job:
        """The same with arrivals `rate` times as fast as the workload has them."""
        return replace(self, workload=replace(self.workload, rate=rate))


def run_job(
    job: Job, *, progress: Progress | None = None, timeline: Timeline | None = None
) -> dict[str, Any]:
    """Simulate and summarize. Raises ConfigError or WorkloadError for what cannot be."""
    workload = job.workload.open(job.settings.costs().prefill_s)
    started = time.perf_counter()
    simulation = Simulation(workload, job.settings, seed=job.seed, timeline=timeline)
    result = simulation.run(progress)
    settings, cache = job.settings, job.settings.cache
    return {
        "labels": job.labels,
        "workload": {
            "spec": job.workload.spec.split("/")[-1],
            "name": workload.name,
            "block_tokens": workload.block_tokens,
            "rate": job.workload.rate,
            "length": str(job.workload.length),
            "pause": job.workload.pause,
            "limit": job.workload.limit,
            "spread_s": job.workload.spread_s,
            "turns": job.workload.turns,
            "slo_mix": job.workload.slo_mix,
            "seed": job.workload.seed,
        },
        "settings": {
            "model": settings.model.name,
            "device": settings.device.name,
            "policy": settings.policy,
            "iteration_policy": settings.iteration_policy,
            "swap": settings.swap,
            "eviction": cache.eviction,
            "protect_expected": cache.protect_expected,
            "hints": cache.hints,
            "learn_pauses": cache.learn_pauses,
            "whole_leaves": cache.whole_leaves,
            "stop_policy": cache.stop_policy,
            "load_policy": cache.load_policy,
            "device_tokens": settings.device_tokens(),
            "host_tokens": int(cache.host_bytes // settings.model.kv_bytes_per_token),
            "disk_tokens": int(cache.disk_bytes // settings.model.kv_bytes_per_token),
            "chunk_tokens": settings.chunk_tokens,
            "max_running": settings.max_running,
            "mixed_chunk": settings.mixed_chunk,
            "max_new_tokens": settings.max_new_tokens,
            "noise": settings.noise,
            "belief": asdict(settings.belief),
            "seed": job.seed,
        },
        "wall_s": time.perf_counter() - started,
        **summarize(result, criterion=job.criterion, n_warm_up=job.n_warm_up),
    }


def run_jobs(
    jobs: Iterable[Job],
    *,
    n_workers: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Results in the order of `jobs`; `progress` is called after each."""
    jobs = list(jobs)
    results = []
    if n_workers <= 1:
        for job in jobs:
            results.append(run_job(job))
            progress()
        return results
    # Spawned, not forked: a fork of a process with threads (progress bars, plots) may hang.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(n_workers, max(1, len(jobs)))) as pool:
        for result in pool.imap(run_job, jobs):
            results.append(result)
            progress()
    return results


@functools.lru_cache(maxsize=4)
def _open(spec: str, seed: int) -> Workload:
    """A sweep reads its trace once per process."""
    return open_workload(spec, seed)
