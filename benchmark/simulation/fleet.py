"""Where a store that servers share pays: fleets of 2 to 1,000 simulated servers.

    python -m benchmark.simulation.fleet --mooncake mooncake_conversation.jsonl \
        --agents agent_sessions.jsonl

Each server is an H200 with Llama-3.1-8B, host memory, a disk, and this project's scheduler; a
gateway spreads requests over them in one of three ways, with or without a shared store. Each run is
appended to the result file as it ends, so that a command that was broken off goes on where it was;
--report only writes the report.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.simulation.fleet_report import report
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.simulation.engine import Simulation
from tiered_kv.simulation.first_turns import FirstTurns
from tiered_kv.simulation.instance import Instance
from tiered_kv.simulation.jobs import WorkloadChoice
from tiered_kv.simulation.routers import ROUTINGS, everybody, make_router, one_for_another
from tiered_kv.simulation.settings import GB, CacheSettings, InstanceSettings, SharedStoreSpec
from tiered_kv.simulation.statistics import summarize
from tiered_kv.simulation.workload.request import Request, Workload
from tiered_kv.simulation.workload.tiled import TiledWorkload

SLO_MIX = "interactive:0.6:0.5:0.05,standard:0.3:2:0.1,batch:0.1:30:-"
STORES = ("none", "value", "all")
STORE_BYTES_PER_SERVER = 1000 * GB
REPLACED_S = 10.0
"""Where servers come and go: of 16, each is there for 160 seconds, half of the time."""
RUN_S = 330.0
"""What the longest traffic takes."""
SHIFT_S = 30.0
"""The servers' shares of the workload start within so many seconds of each other."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """What each server's share of a workload is."""

    name: str
    choice: WorkloadChoice
    share: float
    """Of the trace's conversations, how many each share has,"""
    turns: int | None = None
    """and so many calls of each."""
    is_slow: bool = False
    """Whether to simulate it takes long."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """One run."""

    traffic: str
    n_servers: int
    routing: str
    store: str
    length: float = 1.0
    """The part of the traffic's time that is simulated."""
    load: float = 1.0
    """The part of the traffic of each server."""
    replaced_s: float = 0.0
    """So often a server goes, and an empty one comes; 0: never."""

    @property
    def name(self) -> str:
        """Tells it from the others in a result file."""
        name = f"{self.traffic} {self.n_servers} {self.routing} {self.store} {self.length:g}"
        name += f" load {self.load:g}" if self.load != 1 else ""
        return name + (f" replaced {self.replaced_s:g}" if self.replaced_s else "")


def fleets(traffic: Traffic) -> Iterator[Fleet]:
    """The runs for one kind of traffic.

    A request takes 10 ms of processor time, one of an agent ten times as long: many servers are
    simulated for a part of the time, or with a part of the load.
    """
    name = traffic.name
    for routing in ROUTINGS:
        for store in STORES:
            yield Fleet(name, 2, routing, store)
            if not traffic.is_slow:
                yield Fleet(name, 16, routing, store)
    for store in ("none", "value"):
        for routing in ("session", "random"):
            if traffic.is_slow:
                yield Fleet(name, 16, routing, store)
            else:
                yield Fleet(name, 128, routing, store, length=0.125)
                yield Fleet(name, 1000, routing, store, length=0.2, load=0.05)
        if not traffic.is_slow:
            for routing in ("session", "cache-aware"):
                yield Fleet(name, 16, routing, store, replaced_s=REPLACED_S)


def traffics(options: argparse.Namespace) -> list[Traffic]:
    """Those whose traces were given."""
    found = []
    if options.mooncake:
        # 18 minutes of the service in 5: a tenth of its conversations keep one server busy.
        choice = WorkloadChoice(
            spec=f"mooncake:{options.mooncake}", limit=3600, spread_s=3.0, rate=4.0, slo_mix=SLO_MIX
        )
        found.append(Traffic("mooncake", choice, share=0.1))
    if options.agents:
        choice = WorkloadChoice(
            spec=f"agent_sessions:{options.agents},arrivals=poisson:0.05",
            limit=100,
            pause=0.2,
            rate=6.0,
            slo_mix=SLO_MIX,
        )
        found.append(Traffic("agents", choice, share=0.1, turns=8, is_slow=True))
    return found


def settings(fleet: Fleet) -> InstanceSettings:
    """Of each server: this project's defaults, with host and disk as a GPU server has them."""
    shared = None
    if fleet.store != "none":
        n_bytes = fleet.n_servers * STORE_BYTES_PER_SERVER
        shared = SharedStoreSpec(capacity_bytes=n_bytes, writes=fleet.store)
    return InstanceSettings(
        model=find_model("Llama-3.1-8B"),
        device=find_device("H200-141"),
        policy="slack",
        cache=CacheSettings(
            host_bytes=256 * GB,
            disk_bytes=4000 * GB,
            load_policy="cost",
            stop_policy="patience",
            shared=shared,
        ),
    )


def run(fleet: Fleet, traffic: Traffic, seed: int = 0) -> dict[str, Any]:
    """Simulates one fleet; returns its figures."""
    choice = traffic.choice
    if choice.limit is not None:
        choice = replace(choice, limit=int(choice.limit * fleet.length))
    workload: Workload = TiledWorkload(
        choice.open(), fleet.n_servers, SHIFT_S, share=traffic.share * fleet.load, seed=seed
    )
    if traffic.turns is not None:
        workload = FirstTurns(workload, traffic.turns)
    n_instances, present = fleet.n_servers, everybody
    if fleet.replaced_s:
        n_instances += int(RUN_S / fleet.replaced_s)
        present = one_for_another(fleet.replaced_s, fleet.n_servers)
    route, n_sent = make_router(fleet.routing, seed, present), Counter[int]()

    def counted(request: Request, instances: Sequence[Instance]) -> int:
        server = route(request, instances)
        n_sent[server] += 1
        return server

    started = time.process_time()
    simulation = Simulation(
        workload,
        settings(fleet),
        n_instances=n_instances,
        router=counted,
        seed=seed,
    )
    with tqdm(desc=fleet.name, unit=" requests", leave=False) as bar:
        summary = summarize(simulation.run(bar.update))
    shared = simulation.shared
    block_bytes = simulation.instances[0].cache.block_bytes
    return {
        "fleet": fleet.name,
        "traffic": fleet.traffic,
        "n_servers": fleet.n_servers,
        "routing": fleet.routing,
        "store": fleet.store,
        "length": fleet.length,
        "load": fleet.load,
        "replaced_s": fleet.replaced_s,
        "cpu_s": time.process_time() - started,
        "stored_bytes": 0 if shared is None else len(shared) * block_bytes,
        "new_bytes": 0 if shared is None else shared.n_written * block_bytes,
        "busiest": max(n_sent.values()) * fleet.n_servers / n_sent.total(),
        **_figures(summary),
    }


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    """What the report needs: a thousand distributions would be megabytes."""
    names = ("n_requests", "n_finished", "duration_s", "attainment", "goodput_rps", "busy_share")
    ttft = {name: summary["ttft_s"][name] for name in ("mean", "p50", "p90", "p99")}
    links = {name: use["n_bytes"] for name, use in summary["links"].items()}
    return {
        **{name: summary[name] for name in names},
        "ttft_s": ttft,
        "hits": summary["hits"],
        "links": links,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a result file, one JSON object a line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate what is not in the result file yet and write the report."""
    parser = parser_of("benchmark.simulation.fleet", __doc__)
    parser.add_argument("--mooncake", type=Path, help="path of mooncake_conversation.jsonl")
    parser.add_argument("--agents", type=Path, help="path of agent_sessions.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS / "simulation_fleet.jsonl")
    parser.add_argument("--servers", type=int, action="append", help="only fleets of this size")
    parser.add_argument("--report", action="store_true", help="simulate nothing")
    options = parser.parse_args(arguments)
    done = {found["fleet"] for found in read(options.out)}
    if not options.report:
        todo = [
            (fleet, traffic)
            for traffic in traffics(options)
            for fleet in fleets(traffic)
            if fleet.name not in done
            and (options.servers is None or fleet.n_servers in options.servers)
        ]
        todo.sort(
            key=lambda each: (each[1].is_slow, each[0].n_servers * each[0].length * each[0].load)
        )
        for fleet, traffic in tqdm(todo, desc="fleets", unit=" runs"):
            found = run(fleet, traffic)
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
    print(report(options.out, read(options.out)))


if __name__ == "__main__":
    main()
