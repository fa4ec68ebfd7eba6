"""Which eviction policy pays, alone and with the forecast as a filter before it.

    python -m benchmark.simulation.eviction --data DIRECTORY

Every policy, without and with forecasts, on every recorded trace in --data and on generated agents,
chats and questions over documents; with two tiers (device and host) and with three (a disk below),
each at two sizes. The forecast is what the queue's order expects, and for agents what their clients
say of the next call. Two bounds per size: an infinite cache, and Belady's policy, or where arrivals
depend on answers kvflow, which knows when each session comes back. Writes
simulation_eviction.json to --out, anew after each size, and in the end .md and .png. It takes about
five minutes of a core.

A data directory has mooncake_conversation.jsonl, agent_sessions.jsonl, azure_llm_2023_conv.csv and
taubench_text/; without --data only generated workloads are played.

Examples:
  python -m benchmark.simulation.eviction --data traces                  the whole sweep
  python -m benchmark.simulation.eviction --only chat,rag --out /tmp     a part of it
  python -m benchmark.simulation.eviction --report                       the report alone
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from benchmark.command_line import RESULTS, parser_of
from benchmark.simulation.eviction_report import report
from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.simulation import schema
from tiered_kv.simulation.jobs import Job, WorkloadChoice, run_job
from tiered_kv.simulation.settings import CacheSettings, InstanceSettings
from tiered_kv.simulation.statistics import without_curves
from tiered_kv.simulation.tables import Run

SLO_MIX = "interactive:0.6:0.5:0.05,standard:0.3:2:0.1,batch:0.1:30:-"
MODEL, DEVICE = "Llama-3.1-8B", "H200-141"
POLICIES = ("lru", "tlru")
"""The server's and upstream's; others were tried, see ADR 17."""
#: Tokens in a tier as multiples of those on the device; the host's is the server's default.
HOST_RATIO, DISK_RATIO = 2, 16
INFINITE_BYTES = 10**17


@dataclass(frozen=True)
class Played:
    """One workload, and device pools that are small and ample for it, in tokens."""

    workload: WorkloadChoice
    device_tokens: tuple[int, int]
    bound: str
    """Who knows the future of it: belady or kvflow."""
    hints: bool = False
    max_new_tokens: int | None = 2048


def played(data: Path | None) -> dict[str, Played]:
    """The workloads by name: the recorded ones if there is a directory with them."""

    def choice(spec: str, **changes: object) -> WorkloadChoice:
        return replace(WorkloadChoice(spec=spec, slo_mix=SLO_MIX), **changes)

    agents = choice("agents,sessions=30,arrivals=poisson:0.15")
    found = {"agents": Played(agents, (200_000, 400_000), "kvflow", hints=True)}
    chat = choice("chat,sessions=200,arrivals=poisson:3")
    found["chat"] = Played(chat, (50_000, 150_000), "kvflow")
    rag = choice("rag,requests=700,arrivals=poisson:5")
    found["rag"] = Played(rag, (50_000, 200_000), "belady")
    if data is None:
        return found
    agents = choice(
        f"agent_sessions:{data}/agent_sessions.jsonl,arrivals=poisson:0.05",
        limit=18, turns=12, pause=0.2,
    )  # fmt: skip
    found["agent_sessions"] = Played(agents, (250_000, 500_000), "kvflow", hints=True)
    mooncake = choice(
        f"mooncake:{data}/mooncake_conversation.jsonl", limit=400, spread_s=3.0, rate=0.4
    )
    found["mooncake"] = Played(mooncake, (400_000, 1_000_000), "belady")
    azure = choice(f"azure:{data}/azure_llm_2023_conv.csv", limit=400, rate=4.0)
    found["azure"] = Played(azure, (50_000, 200_000), "belady")
    tau = choice(f"chat_log:{data}/taubench_text,block_tokens=16", rate=20.0)
    found["taubench"] = Played(tau, (1_500, 3_000), "belady", max_new_tokens=None)
    return found


def jobs(name: str, one: Played) -> Iterator[Job]:
    """All runs on one workload: bounds, then policies, without forecasts and with."""
    model = find_model(MODEL)
    for size, device_tokens in zip(("small", "large"), one.device_tokens, strict=True):
        device_bytes = int(device_tokens * model.kv_bytes_per_token)
        for tiers in (2, 3):
            cache = CacheSettings(
                device_bytes=device_bytes,
                host_bytes=HOST_RATIO * device_bytes,
                disk_bytes=DISK_RATIO * device_bytes if tiers == 3 else 0,
                load_policy="cost",
                stop_policy="patience",
                protect_expected=False,
            )
            settings = InstanceSettings(
                model=model,
                device=find_device(DEVICE),
                policy="slack",
                max_new_tokens=one.max_new_tokens,
                cache=cache,
            )
            labels = {"workload": name, "size": size, "tiers": tiers}
            job = Job(workload=one.workload, settings=settings, labels=labels)
            if tiers == 2:
                yield labelled(job, "infinite", host_bytes=INFINITE_BYTES)
            yield labelled(job, one.bound, eviction=one.bound)
            for policy in POLICIES:
                yield labelled(job, policy, eviction=policy)
                yield labelled(
                    job,
                    f"{policy}, forecast",
                    eviction=policy,
                    protect_expected=True,
                    hints=one.hints,
                )


def labelled(job: Job, name: str, **changes: object) -> Job:
    """`job` with another cache, called `name`."""
    cache = replace(job.settings.cache, **changes)
    settings = replace(job.settings, cache=cache)
    return replace(job, settings=settings, labels={**job.labels, "name": name})


def slim(run: Run) -> Run:
    """`run` without curves and classes, which the report leaves out and which fill the file."""
    return {**without_curves(run), "classes": {}}


def commit() -> str:
    """What is checked out, as git names it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate what was asked for and write the report."""
    parser = parser_of("benchmark.simulation.eviction", __doc__)
    parser.add_argument("--data", type=Path, metavar="DIRECTORY", help="where the traces are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", metavar="NAMES", help="workloads, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="for all that is random (default 0)")
    parser.add_argument("--report", action="store_true", help="only write the report again")
    chosen = parser.parse_args(arguments)
    path = chosen.out / "simulation_eviction.json"
    if not chosen.report:
        workloads = played(chosen.data)
        names = chosen.only.split(",") if chosen.only else list(workloads)
        unknown = [name for name in names if name not in workloads]
        if unknown:
            parser.error(f"no workload {unknown[0]!r}; there are {', '.join(workloads)}")
        made_at, runs = commit(), []
        todo = [job for name in names for job in jobs(name, workloads[name])]
        for job in tqdm(todo, unit=" runs"):
            seeded = replace(job.workload, seed=chosen.seed)
            made = {**job.labels, "commit": made_at}
            runs.append(slim(run_job(replace(job, workload=seeded, seed=chosen.seed, labels=made))))
            if job is todo[-1] or job.labels["name"] == "infinite":
                schema.write_results(path, runs)
    print(report(path))


if __name__ == "__main__":
    main()
