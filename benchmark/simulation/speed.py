"""How many requests a minute the simulator gets through, with long prompts.

    python benchmark/simulation/speed.py --mooncake mooncake_conversation.jsonl \
        --out benchmark/results/simulation_speed.md

Times are of the processor, not of the clock on the wall, so that other work on the machine does not
count; `--profile` prints where the time goes instead. Without a trace, documents of 12k tokens are
generated.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import platform
import pstats
import sys
import time
from pathlib import Path

from tqdm import tqdm

from tiered_kv.core.device_spec import find_device
from tiered_kv.core.model_spec import find_model
from tiered_kv.simulation.jobs import Job, WorkloadChoice, run_job
from tiered_kv.simulation.settings import GB, CacheSettings, InstanceSettings
from tiered_kv.simulation.tables import Column, Run, markdown, percent, seconds

GENERATED = "rag,requests=3000,document_tokens=5000,block_tokens=512,documents=1000"


def jobs(options: argparse.Namespace) -> list[Job]:
    """The same requests with one and three tiers, before and beyond saturation."""
    if options.mooncake:
        workload = WorkloadChoice(
            spec=f"mooncake:{options.mooncake}", limit=options.requests, spread_s=3.0
        )
        rates = (0.3, 0.6)
    else:
        workload = WorkloadChoice(spec=GENERATED, limit=options.requests)
        rates = (0.8, 1.6)
    found = []
    for tiers, host, disk in (("device", 0, 0), ("device, host, disk", 256, 4000)):
        for rate in rates:
            for policy in ("fcfs", "lpm", "hrrn"):
                cache = CacheSettings(host_bytes=host * GB, disk_bytes=disk * GB)
                settings = InstanceSettings(
                    model=find_model("Llama-3.1-8B"),
                    device=find_device("H200-141"),
                    policy=policy,
                    cache=cache,
                )
                job = Job(workload=workload, settings=settings, labels={"tiers": tiers})
                found.append(job.at_rate(rate))
    return found


def timed(job: Job) -> Run:
    """The run's figures, with the processor time that it took."""
    started = time.process_time()
    run = run_job(job)
    run["labels"]["cpu_s"] = time.process_time() - started
    return run


def table(runs: list[Run]) -> str:
    """One row per run."""
    columns: list[Column] = [
        ("tiers", lambda run: run["labels"]["tiers"]),
        ("policy", lambda run: run["settings"]["policy"]),
        ("rate", lambda run: f"{run['workload']['rate']:g}"),
        ("busy", lambda run: percent(run["busy_share"])),
        ("mean wait", lambda run: seconds(run["wait_s"]["mean"])),
        ("forward passes", lambda run: f"{run['n_iterations']}"),
        ("CPU seconds", lambda run: f"{run['labels']['cpu_s']:.2f}"),
        (
            "requests per CPU minute",
            lambda run: f"{60 * run['n_requests'] / run['labels']['cpu_s']:.0f}",
        ),
    ]
    return markdown(columns, runs)


def main() -> None:
    """Measure, or profile."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mooncake", type=Path, help="path of mooncake_conversation.jsonl")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--out", type=Path, help="write the table to this file, too")
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    options = parser.parse_args()
    planned = jobs(options)
    run_job(planned[0])  # imports and reading the trace
    if options.profile:
        profile = cProfile.Profile()
        profile.runcall(run_job, planned[-1])
        pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(30)
        return
    runs = [timed(job) for job in tqdm(planned, unit=" runs")]
    mean = runs[0]["hits"]["input"] / runs[0]["n_requests"]
    text = (
        "# Speed of the simulator\n\nMade by `python benchmark/simulation/speed.py"
        f"{' --mooncake mooncake_conversation.jsonl' if options.mooncake else ''}"
        f" --requests {options.requests}`.\n\n"
        f"{runs[0]['n_requests']} requests of {runs[0]['workload']['name']}, {mean:.0f} prompt "
        f"tokens on average, Llama-3.1-8B on H200-141, on one core of {os.cpu_count()} "
        f"({platform.machine()}), Python {platform.python_version()}. Processor time, reading the "
        f"trace not included.\n\n{table(runs)}"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
