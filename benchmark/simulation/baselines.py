"""All baselines on recorded traces: who wins where, before this project's own scheduler.

    python benchmark/simulation/baselines.py --mooncake mooncake_conversation.jsonl \
        --agents agent_sessions.jsonl --out benchmark/results

For each trace and model: the capacity of the best request order (see capacity.py), all orders at
0.8, 1.0 and 1.2 of it, cache policies at 1.0, and hits against the size of the host tier. One
result file each, then one report over all result files in the directory. --only repeats a part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.scheduler.request_policy import request_policies
from tiered_kv.simulation import plots, schema
from tiered_kv.simulation.capacity import SATURATED_RATE, saturated_capacity
from tiered_kv.simulation.jobs import Job, WorkloadChoice, run_jobs
from tiered_kv.simulation.settings import GB, CacheSettings, InstanceSettings
from tiered_kv.simulation.tables import (
    Column,
    Run,
    hits,
    markdown,
    percent,
    results_table,
    seconds,
)

SLO_MIX = "interactive:0.6:0.5:0.05,standard:0.3:2:0.1,batch:0.1:30:-"
LOADS = (0.8, 1.0, 1.2)
ORDERS = ("fcfs", "lpm", "dfs-weight", "priority", "hrrn", "k-lpm", "edf", "niyama")
"""The baselines; policies of this project are compared with them elsewhere."""
MIXED = ("fcfs", "hrrn")
"""Those that are tried with upstream's --enable-mixed-chunk as well."""
MODELS = {
    "8b": ("Llama-3.1-8B", "H200-141", 256 * GB),
    "70b": ("Llama-3.1-70B", "4xH200-141", 1024 * GB),
}
"""Model, device or group, and host memory: 256 GB for each H200."""
DISK_BYTES = 4000 * GB
HOST_SHARES = (1 / 8, 1 / 4, 1 / 2, 1, 2)
AGENT_TURNS = 12
AGENT_PAUSE = 0.2
INFINITE_BYTES = 10**17


def workloads(options: argparse.Namespace) -> dict[str, WorkloadChoice]:
    """The traces that were given, cut to what can be simulated in minutes."""
    found = {}
    if options.mooncake:
        found["mooncake"] = WorkloadChoice(
            spec=f"mooncake:{options.mooncake}",
            limit=options.mooncake_requests,
            spread_s=3.0,
            slo_mix=SLO_MIX,
        )
    if options.agents:
        found["agents"] = WorkloadChoice(
            spec=f"agent_sessions:{options.agents},arrivals=poisson:0.05",
            limit=options.agent_sessions,
            turns=AGENT_TURNS,
            pause=AGENT_PAUSE,
            slo_mix=SLO_MIX,
        )
    return found


def base_job(workload: WorkloadChoice, model: str) -> Job:
    """Three tiers, LRU, as HiCache waits for its pages."""
    name, device, host_bytes = MODELS[model]
    return Job(
        workload=workload,
        settings=InstanceSettings(
            model=find_model(name),
            device=find_device(device),
            cache=CacheSettings(host_bytes=host_bytes, disk_bytes=DISK_BYTES),
        ),
    )


def with_cache(job: Job, name: str, **changes: Any) -> Job:
    """`job` with another cache, called `name`."""
    labels = {"part": "caches", "name": name}
    cache = replace(job.settings.cache, **changes)
    return replace(job, settings=replace(job.settings, cache=cache), labels=labels)


def cache_jobs(job: Job, clairvoyant: str) -> list[Job]:
    """Cache baselines under one request order."""
    jobs = [
        with_cache(job, "device only", host_bytes=0, disk_bytes=0),
        with_cache(job, "device and host", disk_bytes=0),
    ]
    for stop_policy in ("best_effort", "timeout", "wait_complete"):
        jobs.append(with_cache(job, f"HiCache-like, {stop_policy}", stop_policy=stop_policy))
    for eviction in ("tlru", clairvoyant):
        jobs.append(with_cache(job, f"three tiers, {eviction}", eviction=eviction))
    return jobs


def capacity_jobs(job: Job, clairvoyant: str) -> list[Job]:
    """Device and host only, with hosts of several sizes."""
    host = job.settings.cache.host_bytes
    jobs = []
    for eviction in ("lru", clairvoyant):
        for share in HOST_SHARES:
            size = int(host * share)
            name = f"{eviction}, host {size / GB:g} GB"
            jobs.append(with_cache(job, name, eviction=eviction, host_bytes=size, disk_bytes=0))
    jobs.append(with_cache(job, "infinite", host_bytes=INFINITE_BYTES, disk_bytes=0))
    return [
        replace(found, labels={**found.labels, "part": "hits", "infinite": "infinite" in name})
        for found in jobs
        for name in (found.labels["name"],)
    ]


def measure(name: str, job: Job, workers: int) -> tuple[list[Run], dict[str, Any]]:
    """All runs for one trace and model."""
    clairvoyant = "belady" if name.startswith("mooncake") else "kvflow"
    orders = {
        policy: replace(
            job,
            settings=replace(job.settings, policy=policy),
            labels={"part": "orders", "name": policy},
        )
        for policy in ORDERS
    }
    assert set(ORDERS) <= set(request_policies.names())
    for policy in MIXED:
        # Niyama mixes prefill and decode: what does that do alone?
        settings = replace(job.settings, policy=policy, mixed_chunk=True)
        labels = {"part": "orders", "name": f"{policy}, mixed"}
        orders[labels["name"]] = replace(job, settings=settings, labels=labels)
    with tqdm(desc=f"{name}: capacity", unit=" runs") as bar:

        def note(news: str) -> None:
            bar.set_postfix_str(news)
            bar.update()

        found = saturated_capacity(orders, progress=note)
    jobs = [order.at_rate(found.rate * load) for load in LOADS for order in orders.values()]
    jobs += [some.at_rate(found.rate) for some in cache_jobs(job, clairvoyant)]
    if name == "mooncake_8b":
        # A closed loop would shift its arrivals with every hit: its hits can't be compared so.
        jobs += [some.at_rate(found.rate) for some in capacity_jobs(job, clairvoyant)]
    with tqdm(desc=f"{name}: runs", total=len(jobs), unit=" runs") as bar:
        runs = run_jobs(jobs, n_workers=workers, progress=lambda: _advance(bar))
    return runs, {"by": "saturation", **asdict(found)}


def _advance(bar: tqdm) -> None:
    bar.update(1)


def part(runs: list[Run], name: str) -> list[Run]:
    """The runs of one part of the report."""
    return [run for run in runs if run["labels"]["part"] == name]


def report(directory: Path) -> Path:
    """Tables and pictures over the result files in `directory`."""
    lines = [INTRODUCTION]
    for path in sorted(directory.glob("simulation_*_*b.json")):
        data = schema.read_results(path)
        lines += section(path.stem, data["runs"], data["capacity"], directory)
    target = directory / "simulation_baselines.md"
    target.write_text("\n".join(lines))
    return target


def section(slug: str, runs: list[Run], capacity: dict[str, Any], directory: Path) -> list[str]:
    """One trace and model."""
    orders, first = part(runs, "orders"), runs[0]
    title = f"{first['workload']['name']}, {first['settings']['model']}"
    title += f" on {first['settings']['device']}"
    by_load: dict[float, list[Run]] = {}
    for run in orders:
        by_load.setdefault(round(run["workload"]["rate"] / capacity["rate"], 2), []).append(run)
    cell: Callable[[Run], str] = lambda run: run["labels"]["name"]  # noqa: E731
    columns: list[Column] = [
        ("cache", cell),
        ("hits device/host/disk", hits),
        ("met", lambda run: percent(run["attainment"])),
        ("TTFT mean", lambda run: seconds(run["ttft_s"]["mean"])),
        ("p99", lambda run: seconds(run["ttft_s"]["p99"])),
        ("tokens computed", lambda run: f"{run['hits']['computed'] / 1e6:.2f} M"),
    ]
    rates = ", ".join(f"{name} {rate:.3f}" for name, rate in capacity["rates"].items())
    summary = (
        f"{first['n_requests']} requests{sessions(first)}, "
        f"{first['n_requests'] - first['n_finished']} of them "
        "longer than the device's KV pool and refused. Capacity, in multiples of the workload's "
        "own rate: "
        f"**{capacity['rate']:.3f}** ({capacity['best']}); of each order: {rates}."
    )
    lines = [
        f"## {title}",
        "",
        summary,
        "",
    ]
    for load, some in sorted(by_load.items()):
        lines += [f"### Load {load:.1f}", "", winners(some), "", results_table(some)]
    pictures = {
        "goodput": lambda path: plots.plot_goodput(orders, path, title),
        "cdf": lambda path: plots.plot_cdfs(by_load[1.0], path, f"{title}, load 1.0"),
        "wait": lambda path: plots.plot_wait_tail(by_load[1.2], path, f"{title}, load 1.2"),
        "classes": lambda path: plots.plot_classes(by_load[1.2], path, f"{title}, load 1.2"),
        "hits": lambda path: plots.plot_hits(part(runs, "hits"), path, title),
    }
    lines += ["### Caches at load 1.0, order fcfs", "", markdown(columns, part(runs, "caches"))]
    if part(runs, "hits"):
        lines += ["### Hits against the size of the host tier, no disk", ""]
        lines += [markdown(columns, part(runs, "hits"))]
    else:
        del pictures["hits"]
    for name, draw in pictures.items():
        draw(directory / f"{slug}_{name}.png")
        lines += [f"![{name}]({slug}_{name}.png)", ""]
    return lines


def sessions(run: Run) -> str:
    """Of how many sessions the workload is, if it is of sessions."""
    workload = run["workload"]
    return f" of {workload['limit']} sessions" if workload.get("turns") is not None else ""


def winners(runs: list[Run]) -> str:
    """Who is best at what, in a sentence."""

    def best(figure: Callable[[Run], float], sign: int) -> str:
        first, second = sorted(runs, key=lambda run: sign * figure(run))[:2]
        ratio = figure(first) / figure(second) if figure(second) else 1.0
        return f"{first['labels']['name']} ({ratio:.2f} of {second['labels']['name']}'s)"

    fcfs = next(run for run in runs if run["labels"]["name"] == "fcfs")
    return (
        f"Most goodput: {best(lambda run: run['goodput_rps'], -1)}. Least mean TTFT: "
        f"{best(lambda run: run['ttft_s']['mean'], 1)}. Least p99 TTFT: "
        f"{best(lambda run: run['ttft_s']['p99'], 1)}. fcfs misses "
        f"{percent(1 - fcfs['attainment'])} of the objectives."
    )


INTRODUCTION = f"""\
# Baselines in simulation

Made by `python benchmark/simulation/baselines.py --mooncake mooncake_conversation.jsonl --agents
agent_sessions.jsonl --out benchmark/results`; how the simulator works, and what it leaves out, is
in `docs/simulation.md`. These are simulated figures: the cost model is a roofline of the device's
data sheet with assumed efficiencies, not a measurement.

- Server: chunks of 8192 prefill tokens, prefill before decode, at most 256 requests decoding,
  clients' limit 2048 new tokens. Host tier 256 GB per H200, disk tier 4 TB at 6 GB/s, LRU, requests
  wait for their pages from disk, unless a table says otherwise. `niyama` mixes prefill and decode
  in an iteration; `mixed` are orders with upstream's --enable-mixed-chunk. The cost model lets
  arithmetic and memory traffic of an iteration overlap perfectly, which flatters mixing.
- Objectives: 60% interactive (TTFT 500 ms, TBT 50 ms), 30% standard (2 s, 100 ms), 10% batch (30 s,
  none), drawn per session or request. A request's TBT is the mean over its tokens. `priority`
  orders by class.
- mooncake_conversation: the first requests of the hour, arrivals spread over the trace's 3 s clock.
- agent_sessions: the first {AGENT_TURNS} calls of the first sessions, started by a Poisson process,
  pauses times {AGENT_PAUSE} (a few last hours); each call waits for the answer before it.
- Capacity: the rate at which requests bring as many seconds of forward passes per second as a
  saturated server (the workload at {SATURATED_RATE:g} times its rate) needs for them. Loads are
  multiples of the best order's capacity; beyond 1 queues grow as long as requests arrive.
- `belady` knows all arrivals; `kvflow` knows when each session's next call comes. Both are limits,
  not baselines one could deploy as they are.
"""


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Which traces, how much of them, and where results go."""
    parser.add_argument("--mooncake", type=Path, help="path of mooncake_conversation.jsonl")
    parser.add_argument("--agents", type=Path, help="path of agent_sessions.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", help="one of mooncake_8b, mooncake_70b, agents_8b, agents_70b")
    parser.add_argument("--mooncake-requests", type=int, default=1500)
    parser.add_argument("--agent-sessions", type=int, default=60)


def main() -> None:
    """Simulate what was asked for and write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_trace_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    options = parser.parse_args()
    for trace, workload in workloads(options).items():
        for model in MODELS:
            name = f"{trace}_{model}"
            if options.only in {None, name}:
                runs, capacity = measure(name, base_job(workload, model), options.workers)
                path = options.out / f"simulation_{name}.json"
                schema.write_results(path, runs, capacity)
                print(json.dumps({"file": str(path), "capacity": capacity["rate"]}))
    print(report(options.out))


if __name__ == "__main__":
    main()
